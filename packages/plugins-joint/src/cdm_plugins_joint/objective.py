"""What a joint model minimises: the denoiser's loss, and the cross-entropy of its head (Deja et al. 2023).

    L = E |eps - eps(x_t, t)|^2 / dim + w_ce E CE(head(encoder(a(x0), 0)), y)        classify = clean
    L = E |eps - eps(x_t, t)|^2 / dim + w_ce E CE(head(encoder(x_t, t)), y)          classify = noised

where a is an augmentation that the denoiser never sees. The encoder runs once a step, over the rows of both
terms together: a clean image is one more row, and what was noised for the denoiser is classified by the maps
that are decoded. Labels may be missing: the denoiser learns from every image, the head from those with one
(`semi_supervised`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_core.adapters import Wrapper
from cdm_core.backbones.adm import Features
from cdm_core.denoisers import Output
from cdm_core.denoising import DenoisingObjective
from cdm_core.errors import UserError
from cdm_core.random import Draws
from cdm_plugins_joint.augmentation import augmented
from cdm_plugins_joint.configs import JointObjectiveConfig
from cdm_plugins_joint.model import JointModel
from cdm_plugins_joint.semi_supervised import decoded

Prepared = tuple[Tensor | None, ...]


class Labels(NamedTuple):
    """Of B rows: q (B, K), 1 at the class, or attributes, 0 or 1, negative where unknown; known (B,) bool,
    whether there is anything to classify; alone (B,) bool, rows for the head alone; told (B,) int64 or None,
    what a class-conditional denoiser is told."""

    q: Tensor
    known: Tensor
    alone: Tensor
    told: Tensor | None

    @classmethod
    def of(cls, model: JointModel, y: Tensor | None, like: Tensor) -> Labels:
        """Of y as the data have it, (B,) or, of attributes, (B, K); None: no image has one."""
        shape = (len(like), model.classes) if model.multi_label else (len(like),)
        if y is None:
            y = torch.full(shape, -1, device=like.device)
        if y.shape != shape:
            raise UserError(
                f"labels of shape {tuple(y.shape)}, where model.multi_label = "
                f"{str(model.multi_label).lower()} wants {shape}"
            )
        k, alone = decoded(y)
        if model.multi_label:
            return cls(k.to(like.dtype), (k >= 0).any(1), alone.any(1), None)
        known = k >= 0
        told = None if model.null_label is None else torch.where(known, k, model.null_label)
        return cls(F.one_hot(k.clamp(min=0), model.classes).to(like.dtype), known, alone, told)


class JointObjective:
    """`objective(model, x0, y, draws) -> {"loss", "mse"[, "vlb"], "ce", "accuracy", ...}`, scalars.

    y (B,) int64 or, of a model of attributes, (B, K), as `semi_supervised.decoded` reads it. `ce`, in nats,
    and `accuracy` are means over the images with a label, 0 in a pass without any: of clean images, and
    `ce_noised`, `accuracy_noised` of noised ones. In order, `draws` gives what the denoiser's loss draws,
    then the augmentation: whatever is trained, the denoiser sees the same numbers. Nothing is augmented in
    evaluation mode.

    It is split, `loss` of what `prepare` drew, so that `loss` can be compiled (`cdm_core.compiled`).
    """

    def __init__(self, config: JointObjectiveConfig) -> None:
        self.config, self.denoising = config, DenoisingObjective(config.denoising)

    def __call__(self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws) -> dict[str, Tensor]:
        """x0 (B, C, H, W) float32 in model units."""
        return self.loss(model, *self.prepare(model, x0, y, draws))

    # -- everything random -----------------------------------------------------------------------------------

    def prepare(self, model: Any, x0: Tensor, y: Tensor | None, draws: Draws) -> Prepared:
        """The denoiser's rows (x0, x_t, t, eps, classes), the head's noised rows (4) and clean ones (2).

        What each of them is, is said in `loss`.
        """
        if not isinstance(model, JointModel):
            raise UserError(f"the objective joint/joint trains joint models, not a {type(model).__name__}")
        if y is None and self.config.train != "denoiser":
            raise UserError("a joint model is trained on labelled data, and these have no labels")
        labels = Labels.of(model, y, x0)
        rows: Prepared = self.denoising.prepare(model, x0, labels.told, draws)
        several = bool(labels.alone.any())
        main = rows
        if self.config.train == "classifier":
            main = (None,) * len(rows)
        elif several:
            main = tuple(None if v is None else v[~labels.alone] for v in rows)
        noised = self._noised(model, rows, labels, several)
        return *main, *noised, *self._clean(model, x0, labels, draws)

    def _noised(self, model: JointModel, rows: Prepared, labels: Labels, several: bool) -> Prepared:
        """Rows that are noised for the head alone, their levels, the places of all that it is shown, labels.

        A denoiser that is told the class shares no row with the head, which must not be. several: there are
        rows that are not denoised.
        """
        if self.config.train == "denoiser" or self.config.classify == "clean":
            return None, None, None, None
        _, x_t, t, *_ = rows
        assert x_t is not None and t is not None  # noqa: PT018 - both or none
        known, alone = labels.known, labels.alone
        if self.config.train == "classifier" or model.num_classes is not None:
            return x_t[known], t[known], None, labels.q[known]
        order = alone.sort(stable=True).indices  # the denoised first
        places = known[order].nonzero()[:, 0]
        more = (x_t[alone], t[alone]) if several else (None, None)
        return *more, places, labels.q[order[places]]

    def _clean(self, model: JointModel, x0: Tensor, labels: Labels, draws: Draws) -> Prepared:
        """The clean images that the head is shown, and their labels."""
        if self.config.train == "denoiser" or self.config.classify == "noised":
            return None, None
        known = labels.known.nonzero()[:, 0]
        x, q = x0[known], labels.q[known]
        return augmented(x, q, self.config.augmentation, draws, known) if model.training else (x, q)

    # -- tensor operations alone -----------------------------------------------------------------------------

    def loss(
        self,
        model: JointModel,
        x0: Tensor | None,
        x_t: Tensor | None,
        t: Tensor | None,
        eps: Tensor | None,
        classes: Tensor | None,
        more: Tensor | None,
        more_t: Tensor | None,
        places: Tensor | None,
        q_noised: Tensor | None,
        clean: Tensor | None,
        q_clean: Tensor | None,
    ) -> dict[str, Tensor]:
        """The losses of what `prepare` returned.

        D rows are denoised; M noised rows `more` are not. Of these D + M the head is shown those at `places`
        (None: the M), whose labels are `q_noised`; and images `clean`, whose labels are `q_clean`.
        """
        first = None if clean is None else torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
        given = [(x_t, t, classes), (more, more_t, None), (clean, first, None)]
        encoded = _encoded(model, [_batch(model, *rows) for rows in given])
        scalars: dict[str, Tensor] = {}
        if x_t is not None:
            ready: Any = _Ready(model, encoded[0])
            scalars = self.denoising.loss(ready, x0, x_t, t, eps, classes)  # type: ignore[arg-type]
        if q_noised is None and q_clean is None:
            return scalars
        weight = self.weight(model)
        noisy = encoded[1:2] if places is None else encoded[:2]
        kinds = [_Shown("_noised", noisy, places, q_noised), _Shown("", encoded[2:], None, q_clean)]
        ce, found = self._classified(model, [kind for kind in kinds if kind.q is not None])
        loss = ce if x_t is None else scalars["loss"] + weight * ce
        return {**scalars, **found, "loss": loss}

    def weight(self, model: JointModel) -> Tensor | float:
        """w_ce, or as much of it as is due after the head's training passes so far."""
        settings = self.config
        if not settings.late_start and not settings.ramp:
            return settings.w_ce
        due = (model.passes + 1 - settings.late_start) / max(settings.ramp, 1)
        return settings.w_ce * due.clamp(0, 1)

    def _classified(self, model: JointModel, shown: Sequence[_Shown]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean cross-entropy of all that the head is shown, and the scalars of each kind."""
        sizes = [len(kind.labels) for kind in shown]
        # The BatchNorm of the released head has no variance of a single row.
        if sum(sizes) < (2 if model.training and model.official else 1):
            nothing = 0 * sum(p.sum() for p in model.classifier_head.parameters())
            assert isinstance(nothing, Tensor)
            scalars = [f"{name}{kind.suffix}" for kind in shown for name in ("ce", "accuracy")]
            return nothing, dict.fromkeys(scalars, nothing.detach())
        pooled, levels = zip(*(kind.pooled(model) for kind in shown), strict=True)
        t = torch.cat(levels)
        logits = model.logits([torch.cat(maps) for maps in zip(*pooled, strict=True)], t)
        ce, hit = self._terms(model, logits, torch.cat([kind.labels for kind in shown]))
        found = {}
        for kind, own_ce, own_hit in zip(shown, ce.split(sizes), hit.split(sizes), strict=True):
            rows = max(len(own_ce), 1)
            found[f"ce{kind.suffix}"] = own_ce.detach().sum() / rows
            found[f"accuracy{kind.suffix}"] = own_hit.sum() / rows
        if self.config.taper:
            ce = ce * (1 - t / len(model.path)) ** self.config.taper
        return ce.mean(), found

    def _terms(self, model: JointModel, logits: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats and share of right answers of each row, (M,) both."""
        smoothing = self.config.smoothing
        if not model.multi_label:
            ce = F.cross_entropy(logits, q.to(logits.dtype), reduction="none", label_smoothing=smoothing)
            return ce, (logits.argmax(1) == q.argmax(1)).to(logits.dtype)
        known = (q >= 0).to(logits.dtype)
        count = known.sum(1)
        smooth = (q * (1 - smoothing) + smoothing / 2).clamp(0, 1).to(logits.dtype)
        ce = F.binary_cross_entropy_with_logits(logits, smooth, reduction="none")
        hit = (logits > 0) == (q > 0.5)
        return (known * ce).sum(1) / count, (known * hit).sum(1) / count


# -- one pass of the encoder ---------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """Rows of the network's input: x (N, C, H, W) in the path's own scale, t (N,), y (N,) or None."""

    x: Tensor
    t: Tensor
    y: Tensor | None


class _Maps(NamedTuple):
    """What the encoder made of a batch, and the embedding and levels that it was made with."""

    z: Features
    emb: Tensor
    t: Tensor


class _Shown(NamedTuple):
    """What the head is shown of one kind: rows at `places` (None: all) of batches, their labels q or None."""

    suffix: str  # of the scalars
    batches: Sequence[_Maps | None]
    places: Tensor | None
    q: Tensor | None

    @property
    def labels(self) -> Tensor:
        """q where there are any."""
        assert self.q is not None
        return self.q

    def pooled(self, model: JointModel) -> tuple[list[Tensor], Tensor]:
        """The pooled maps of the rows and their levels."""
        there = [batch for batch in self.batches if batch is not None]
        if not there:
            q, widths = self.labels, (*model.widths, model.widths[-1])
            return [q.new_zeros(0, width) for width in widths], q.new_zeros(0, dtype=torch.int64)
        maps = [torch.cat(parts) for parts in zip(*(model.pooled(batch.z) for batch in there), strict=True)]
        t = torch.cat([batch.t for batch in there])
        return (maps, t) if self.places is None else ([h[self.places] for h in maps], t[self.places])


def _batch(model: JointModel, x: Tensor | None, t: Tensor | None, y: Tensor | None) -> _Batch | None:
    """None without rows; "no class" spelt out where the model knows classes."""
    if x is None or t is None or not len(x):
        return None
    if y is None and model.null_label is not None:
        y = torch.full_like(t, model.null_label)
    return _Batch(x, t, y)


def _encoded(model: JointModel, batches: Sequence[_Batch | None]) -> list[_Maps | None]:
    """The maps of each batch, made in one pass."""
    there = [batch for batch in batches if batch is not None]
    if not there:
        return [None] * len(batches)
    t = torch.cat([batch.t for batch in there])
    classes = [batch.y for batch in there if batch.y is not None]
    emb = model.embed(t, torch.cat(classes) if classes else None)
    z = model.encode(torch.cat([batch.x for batch in there]), emb)
    sizes = [len(batch.t) for batch in there]
    skips = zip(*(h.split(sizes) for h in z.skips), strict=True)
    parts = zip(skips, z.middle.split(sizes), emb.split(sizes), t.split(sizes), strict=True)
    made = iter([_Maps(Features(skip, middle), e, level) for skip, middle, e, level in parts])
    return [None if batch is None else next(made) for batch in batches]


class _Ready(Wrapper):
    """The model on rows whose maps are there already: all that `DenoisingObjective.loss` asks of it."""

    def __init__(self, model: JointModel, maps: _Maps | None) -> None:
        super().__init__(model)
        assert maps is not None
        self.maps = maps

    def output(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Output:
        """The network's output for the x_t that was encoded."""
        return self.model.decoded(self.maps.z, self.maps.emb)
