"""The masks of each task on small synthetic frames, and their layout at latent resolution."""

import pytest
import torch

from echolab.errors import ConfigError, DataError
from echolab.tasks.masks import face_tokens, gray_out, known_pixels, latent_known
from echolab.tasks.table import TASKS

FRAMES, SIZE = 9, 64
# The head moves to the right by a pixel a frame; the mouth opens and closes.
SHIFT = torch.arange(FRAMES)[:, None] * torch.tensor([1.0, 0, 1, 0])
FACE = torch.tensor([20.0, 16, 40, 44]) + SHIFT
OPEN = torch.tensor([0.0, 1, 2, 1, 0, 1, 2, 1, 0])[:, None] * torch.tensor([0.0, 0, 0, 1])
LIPS = torch.tensor([25.0, 34, 35, 38]) + SHIFT + OPEN


def known(task: str, **changes) -> torch.Tensor:
    arguments = {"frames": FRAMES, "height": SIZE, "width": SIZE, "face": FACE, "lips": LIPS}
    return known_pixels(task, **(arguments | changes))


def test_the_tasks_are_ordered_from_hard_to_easy() -> None:
    assert TASKS == ("t2v", "i2v", "flf2v", "avatar_sync", "lip_sync", "continuation")
    generated = [float((~known(task)).float().mean()) for task in TASKS[:5]]
    assert generated == sorted(generated, reverse=True)


def test_tasks_of_full_frames_have_their_masks() -> None:
    def frames(task: str, **changes) -> list[int]:
        mask = known(task, **changes)
        assert torch.equal(mask.flatten(1).any(1), mask.flatten(1).all(1))
        return mask.flatten(1).all(1).nonzero().flatten().tolist()

    assert frames("t2v") == []
    assert frames("i2v") == [0]
    assert frames("flf2v") == [0, 8]
    assert frames("continuation") == list(range(8))
    assert frames("continuation", known_frames=5) == list(range(5))


def test_avatar_sync_hides_the_head_and_follows_it() -> None:
    mask = known("avatar_sync")
    for frame in range(FRAMES):
        x0, y0, x1, y1 = FACE[frame].int().tolist()
        assert not mask[frame, 0, y0:y1, x0:x1].any()
    assert torch.equal(mask[0, 0, :, :-4], mask[4, 0, :, 4:])
    assert mask.flatten(1).any(1).all(), "what lies outside is given"


def test_lip_sync_hides_the_lips_at_their_widest() -> None:
    mask = known("lip_sync")
    for frame in range(FRAMES):
        x0, y0, x1, y1 = LIPS[frame].int().tolist()
        assert not mask[frame, 0, y0:y1, x0:x1].any()
    assert len(set((~mask).flatten(1).sum(1).tolist())) == 1, "one size for the full clip"
    assert torch.equal(mask[0, 0, :, :-2], mask[2, 0, :, 2:]), "closed and open look the same"


@pytest.mark.parametrize("task", TASKS)
def test_known_and_generated_partition_the_clip(task: str) -> None:
    mask, pixels = known(task), torch.rand(FRAMES, 3, SIZE, SIZE) * 2 - 1
    assert mask.shape == (FRAMES, 1, SIZE, SIZE) and mask.dtype == torch.bool
    given, generated = gray_out(pixels, mask), gray_out(pixels, ~mask)
    assert torch.equal(given + generated, pixels)
    assert not (given * generated).any()


def test_latent_masks_of_full_frames() -> None:
    i2v = latent_known(known("i2v"))
    assert i2v.shape == (4, 3, 8, 8)
    assert i2v[:, 0].eq(1).all() and not i2v[:, 1:].any()
    flf2v = latent_known(known("flf2v"))
    assert flf2v[3, -1].eq(1).all() and not flf2v[:3, -1].any()
    assert flf2v.sum(0)[:, 0, 0].tolist() == [4, 0, 1]
    assert latent_known(known("continuation")).sum(0)[:, 0, 0].tolist() == [4, 4, 3]
    assert not latent_known(known("t2v")).any()


def test_a_mask_channel_is_a_frame() -> None:
    """Channel c of latent frame i >= 1 is frame 4i - 3 + c; frame 0 fills the first."""
    for frame in range(1, FRAMES):
        mask = torch.zeros(FRAMES, 1, 16, 16, dtype=torch.bool)
        mask[frame] = True
        where = latent_known(mask)[:, :, 0, 0].nonzero().tolist()
        assert where == [[(frame + 3) % 4, (frame + 3) // 4]]


def test_borders_are_fractional_and_time_does_not_mix() -> None:
    """Masks equal the trilinear resize of the released pipeline, except for the first frame."""
    mask = known("lip_sync")
    shuffled = torch.cat([mask[:1].expand(4, -1, -1, -1), mask[1:]]).float()
    rows = shuffled.view(1, 3, 4, SIZE, SIZE).transpose(1, 2)  # [1, 4, F, Y, X]

    def resize(part):
        return torch.nn.functional.interpolate(part, (part.shape[2], 8, 8), mode="trilinear")

    released = torch.cat([resize(rows[:, :, :1]), resize(rows[:, :, 1:])], 2)[0]
    torch.testing.assert_close(latent_known(mask), released)
    assert ((released > 0) & (released < 1)).any()


def test_face_tokens_cover_the_union_of_the_boxes() -> None:
    tokens = face_tokens(FACE, 16, 16).view(8, 8)  # a token is 16 pixels
    rows, columns = tokens.any(1).nonzero(), tokens.any(0).nonzero()
    assert tokens.sum() == len(rows) * len(columns), "one box"
    x0, y0 = FACE[:, :2].amin(0)
    x1, y1 = FACE[:, 2:].amax(0)
    assert columns[0] * 16 <= x0 and (columns[-1] + 1) * 16 >= x1 and len(columns) < 5
    assert rows[0] * 16 <= y0 and (rows[-1] + 1) * 16 >= y1 and len(rows) < 5
    corner = face_tokens(torch.tensor([[1.0, 1, 8, 8]]), 8, 12)
    assert corner.shape == (4 * 6,) and corner.nonzero().flatten().tolist() == [0]


def test_sizes_that_do_not_fit_are_refused_by_value() -> None:
    with pytest.raises(ConfigError, match="task=dance"):
        known("dance")
    with pytest.raises(DataError, match=r"lip boxes: shape \(8, 4\)"):
        known("i2v", lips=LIPS[:8])
    with pytest.raises(DataError, match="finite False"):
        known("i2v", face=FACE * torch.nan)
    with pytest.raises(DataError, match="8 frames"):
        latent_known(torch.ones(8, 1, 16, 16))
    with pytest.raises(DataError, match="16x20"):
        latent_known(torch.ones(5, 1, 16, 20))
