"""echolab: training for unified human animation in the manner of EchoMimicV3."""

__version__ = "0.1.0"
