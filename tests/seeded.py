"""SyncNet with weights that any implementation can draw again."""

import numpy as np
import torch
from torch import nn

from echolab.metrics.networks.syncnet import SyncNet


def seeded_syncnet() -> SyncNet:
    """Return SyncNet with He-normal weights of numpy's RandomState(1000 + layer), biases of zero.

    Layers are numbered in the order audio convolutions, audio head, lip head, lip convolutions.
    """
    net = SyncNet().eval().requires_grad_(False)
    streams = (net.netcnnaud, net.netfcaud, net.netfclip, net.netcnnlip)
    kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
    layers = [layer for stream in streams for layer in stream if isinstance(layer, kinds)]
    for index, layer in enumerate(layers):
        shape = layer.weight.shape
        normal = np.random.RandomState(1000 + index).standard_normal(shape)
        scaled = normal * np.sqrt(2 / np.prod(shape[1:]))
        layer.weight.copy_(torch.from_numpy(scaled.astype(np.float32)))
        nn.init.zeros_(layer.bias)
    return net
