"""Each preference loss equals trl's own, given minus the errors as log-likelihoods."""

import collections
import types
import warnings

import pytest
import torch
from torch import Tensor

from echolab.diffusion.preference_losses import PAIR_LOSSES, PairErrors

warnings.filterwarnings("ignore")
trl = pytest.importorskip("trl")


class _OneProcess:
    """The part of accelerate that trl's loss needs."""

    device = torch.device("cpu")

    def gather(self, values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather

    def unwrap_model(self, model: object) -> object:
        return model


def oracle(errors: PairErrors, loss_type: str, beta: float, label_smoothing: float) -> Tensor:
    """Return trl's loss of one-token completions whose log-likelihood is minus the error."""
    logps = -torch.cat([errors.chosen, errors.rejected])[:, None]
    rest = torch.zeros_like(logps.detach())
    outputs = types.SimpleNamespace(
        log_probs=logps, entropy=rest, mean_logits=rest, is_top1=rest.bool(), log_sum_sq_probs=rest
    )
    config = trl.DPOConfig(
        output_dir="unused", report_to="none", bf16=False, use_cpu=True, beta=beta,
        loss_type=[loss_type], label_smoothing=label_smoothing,
    )  # fmt: skip
    trainer = types.SimpleNamespace(
        model=torch.nn.Identity(), args=config, accelerator=_OneProcess(), aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5, loss_types=[loss_type], loss_weights=[1.0], beta=beta,
        label_smoothing=label_smoothing, use_weighting=False, _total_train_tokens=0, _tp_size=1,
        _metrics={"train": collections.defaultdict(list), "eval": collections.defaultdict(list)},
    )  # fmt: skip
    # The prompt is one token and the completion one: ipo and sigmoid_norm divide by its length.
    mask = torch.tensor([[0, 1]]).repeat(len(logps), 1)
    inputs = {
        "input_ids": mask, "attention_mask": mask, "completion_mask": mask,
        "ref_chosen_logps": -errors.reference_chosen,
        "ref_rejected_logps": -errors.reference_rejected,
    }  # fmt: skip

    class _Model(torch.nn.Module):
        def forward(self, **inputs: object) -> types.SimpleNamespace:
            return outputs

    trainer.model = _Model()
    return trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, return_outputs=False)


def drawn(seed: int) -> PairErrors:
    numbers = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed))
    return PairErrors(*(row.clone().requires_grad_(index < 2) for index, row in enumerate(numbers)))


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
@pytest.mark.parametrize("beta", [0.5, 20.0])
def test_value_and_gradient_equal_those_of_trl(loss_type: str, beta: float) -> None:
    smoothing = 0.1 if loss_type in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0
    ours, theirs = drawn(1), drawn(1)
    mine = PAIR_LOSSES[loss_type](ours, beta, smoothing)
    value = oracle(theirs, loss_type, beta, smoothing)
    assert mine.shape == (6,)
    torch.testing.assert_close(mine.mean(), value, rtol=1e-5, atol=1e-6)
    mine.mean().backward()
    value.backward()
    for left, right in zip(ours[:2], theirs[:2], strict=True):
        right_gradient = torch.zeros_like(left) if right.grad is None else right.grad
        left_gradient = torch.zeros_like(left) if left.grad is None else left.grad
        torch.testing.assert_close(left_gradient, right_gradient, rtol=1e-4, atol=1e-6)


def test_every_loss_type_of_trl_is_supported() -> None:
    """A loss type that trl adds or drops fails here."""
    with pytest.raises(ValueError, match="Unknown loss type") as refused:
        oracle(drawn(0), "none of them", 1.0, 0.0)
    named = set(str(refused.value).split("[", 1)[1].rstrip("]").replace("'", "").split(", "))
    assert named == set(PAIR_LOSSES)


def test_at_the_reference_dpo_is_log_2() -> None:
    errors = drawn(2)
    same = PairErrors(errors.chosen, errors.rejected, errors.chosen, errors.rejected)
    loss = PAIR_LOSSES["sigmoid"](same, 500.0, 0.0)
    torch.testing.assert_close(loss, torch.full((6,), 2.0).log())
