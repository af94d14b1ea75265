"""CMT-MAE: masks and targets made together by a frozen teacher and the student's moving average.

Mo 2024, arXiv 2412.17566. Its abstract states: attention of teacher and student is added up linearly and
guides the masks; features of both are the target; ViT-B 83.6 -> 85.7 fine-tuned on ImageNet-1k. By summaries
of it: the teacher is a frozen CLIP ViT-B/16, the student that is asked a moving average of the encoder. The
full text was not at hand.

What these leave open is this project's choice, and a setting of `CMTConfig`: A = a A_teacher + (1 - a)
A_student (see `models.attention_maps`), hidden units drawn in proportion to A, random masks at first,
LayerNormed last-layer features as targets, their distance, the average's schedule. Settled here: two linear
heads on one decoder for the two targets, teacher and student brought to the grid of mask units by averages or
bilinear interpolation, and a loss on hidden units alone.

No pixels are predicted, but people want to see what a model knows, and artifacts hold a decoder: a linear
head learns pixels from the decoder's output, without telling it (stop-gradient). It changes what is learned
only in that its gradient counts where the norm is clipped. `loss` is that of the features.

Teacher features are not kept from epoch to epoch: views are cropped and flipped at random, and of 1.3 million
fixed ones 14 x 14 x 768 features would take 390 GB in half precision.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from coma.config import CMTConfig
from coma.errors import BadInput
from coma.masking.patchify import patchify
from coma.masking.sampling import draw, eager, group_of, keep
from coma.models import Encoder
from coma.models.attention_maps import attend
from coma.models.teacher import Teacher, to_units
from coma.models.vit import init_xavier
from coma.objectives.base import MaskedPixels, ObjectiveOutput
from coma.objectives.targets import hidden_loss, pixel_targets


class CMT(MaskedPixels):
    """Collaborative masks and targets.

    Args:
        config: Shares of teacher and student, masks, distance, moving average, decoder.
        encoder: Any encoder of this room.
        teacher: Without one, it reconstructs but does not learn: what an artifact holds.
    """

    config: CMTConfig
    picture_note = (
        "What it learns to predict is features; these pixels come from a linear head that learns beside, and "
        "these masks are drawn at random, not guided by attention as in training."
    )

    def __init__(self, config: CMTConfig, encoder: Encoder, teacher: Teacher | None = None) -> None:
        super().__init__(config, encoder)
        self._teacher, self._guided = teacher, True
        if teacher:
            self.to_teacher = nn.Linear(config.decoder.dim, teacher.features)
            self.to_student = nn.Linear(config.decoder.dim, encoder.num_features)
            for head in (self.to_teacher, self.to_student):
                init_xavier(head)
            self.average = copy.deepcopy(encoder).requires_grad_(False).eval()

    def forward(self, images: Tensor, seeds: Tensor) -> ObjectiveOutput:
        """Loss of one batch.

        Args:
            images: `[b, c, H, W]`, normalised; H and W whole mask units.
            seeds: int64 `[b]`; with attention, they fix the masks.

        Returns:
            Prediction and target are features `[..., c_teacher + c_student]`.
        """
        h, w = self.grid(images)
        (taught, learnt), attention = self.ask(images)
        visible = self.guided_visible(attention, seeds) if self._guided else self.draw_visible(seeds, h, w)
        features = self.encoder.forward_features(images, group_of(visible[0]), (self._shown(h, w),))
        states = self.decoder.states(features, visible)
        prediction = torch.cat([self.to_teacher(states), self.to_student(states)], dim=-1)
        guesses = prediction.split([taught.shape[-1], learnt.shape[-1]], dim=-1)
        of_teacher, of_student = (
            self.distance(guess, target, visible)
            for guess, target in zip(guesses, (taught, learnt), strict=True)
        )
        share = self.config.target_share
        loss = share * of_teacher + (1 - share) * of_student
        target = pixel_targets(patchify(images, self.encoder.unit), self.config.norm_pix)
        pixels = hidden_loss(self.decoder.head(states.detach()), target, visible)
        metrics = {"loss_teacher": of_teacher, "loss_student": of_student, "loss_pixels": pixels}
        return ObjectiveOutput(
            loss + (pixels - pixels.detach()),  # the value of the one, the gradients of both
            prediction,
            torch.cat([taught, learnt], dim=-1),
            visible,
            metrics,
        )

    @eager
    @torch.no_grad()
    def ask(self, images: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Features of teacher and averaged student, two of `[b, h, w, c]`, and A `[b, h, w]`, of sum 1."""
        if self._teacher is None:
            raise RuntimeError("CMT without its teacher reconstructs, but does not learn")
        grid = self.grid(images)
        taught, attention = self._teacher(images, *grid)
        learnt, own = to_units(*attend(self.average, images, block=self.config.student_block), *grid)
        if self.config.norm_targets:
            taught, learnt = (F.layer_norm(target, target.shape[-1:]) for target in (taught, learnt))
        share = self.config.mask_share
        return (taught, learnt), share * attention + (1 - share) * own

    def guided_visible(self, attention: Tensor, seeds: Tensor) -> Tensor:
        """Returns the units that the one view sees, bool `[1, b, h, w]`, drawn by `attention [b, h, w]`."""
        h, w = attention.shape[1:]
        shown = self._shown(h, w)
        if self.config.hide == "attended":
            return ~draw(attention, seeds, h * w - shown)[None]
        return draw(attention, seeds, shown)[None]

    def draw_visible(self, seeds: Tensor, h: int, w: int) -> Tensor:
        """As many units at random, bool `[1, b, h, w]`: the first steps' masks, and those of pictures."""
        return keep(seeds, h, w, self._shown(h, w))[None]

    def distance(self, guess: Tensor, target: Tensor, visible: Tensor) -> Tensor:
        """Mean over hidden units of 1 - cosine, or of the smooth L1 (Girshick 2015, eq. 3), float32."""
        guess = guess.float()
        if self.config.distance == "cosine":
            apart = 1 - F.cosine_similarity(guess, target.expand_as(guess), dim=-1)
        else:
            apart = F.smooth_l1_loss(guess, target.expand_as(guess), reduction="none").mean(dim=-1)
        hidden = (~visible).float()
        return (apart * hidden).sum() / hidden.sum()

    def check_images(self, height: int, width: int) -> None:
        """Raises BadInput where the student's block that guides the masks does not see the whole map."""
        encoder = copy.deepcopy(self.encoder).to("meta")
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            images = torch.empty(1, encoder.config.channels, height, width)
            attend(encoder.to_empty(device="cpu"), images, block=self.config.student_block)

    def before_step(self, progress: float) -> None:
        """Masks are random as long as less than `random_share` of the run is done."""
        self._guided = progress >= self.config.random_share

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Average <- m average + (1 - m) encoder, m from start to end by a cosine (BYOL, app. A.2)."""
        if self._teacher is None:
            return
        start, end = self.config.ema_decay, self.config.ema_decay_end
        towards = 1 - end + (end - start) * (math.cos(math.pi * progress) + 1) / 2  # 1 - m
        for own, new in zip(self.average.parameters(), self.encoder.parameters(), strict=True):
            _local(own).lerp_(_local(new), towards)

    def train(self, mode: bool = True) -> CMT:
        """Switch to training or evaluation; the averaged student stays in evaluation (no drop path)."""
        super().train(mode)
        if self._teacher:
            self.average.eval()
        return self

    def _shown(self, h: int, w: int) -> int:
        shown = int(h * w * (1 - self.config.mask_ratio))
        if shown < 1:
            raise BadInput(f"hiding {self.config.mask_ratio:.0%} of {h * w} mask units leaves none to see")
        return shown


def _local(parameter: Tensor) -> Tensor:
    # the part of a parameter that lies on this process
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
