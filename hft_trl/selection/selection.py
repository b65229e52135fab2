"""Draw, apply, save and load the selection: what learns in a stage and what stays frozen."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from hft_trl.config import HFTConfig
from hft_trl.errors import HFTError
from hft_trl.files import read_object, write_json, writing
from hft_trl.selection.categories import OUTER_CATEGORIES
from hft_trl.selection.units import Unit, find_units, frozen_by_hft, frozen_by_user, mark_frozen
from hft_trl.weights import named_parameters

if TYPE_CHECKING:
    from hft_trl.selection.importance import Calibrate
    from hft_trl.selection.masks import Masks

SELECTION_FILE = "hft_selection.json"
VERSION = 1


@dataclass(frozen=True)
class Selection:
    """
    Store the parameters of a model that learn in a stage, and those that keep their values.

    Attributes:
        config ([`HFTConfig`]): The settings of the draw.
        seed (`int`): The seed of the draw: `config.seed`, or one derived from it and the start model's selection.
        trainable (`tuple[str, ...]`): Sorted names of the parameters that learn.
        frozen (`tuple[str, ...]`): Sorted names of the parameters that could learn and do not. A parameter in neither
            (excluded, frozen by the model's class, in a tower for pictures or sound) is frozen too.
        share (`dict[str, float]`): Share that learns, in 0 to 1: of each category in the layers, of all layers
            (`"layers"`) and of all parameters that could learn (`"model"`).
        start_model (`dict[str, str]`, *optional*): `{"name_or_path": ..., "weights_digest": ...}` of the stage's start
            model, a name on the hub as `id@revision` unless this is main. It is not part of the digest.
        masks ([`Masks`], *optional*): With strategy `"element"`, which elements of the trainable
            parameters in layers learn. The others are frozen.
    """

    config: HFTConfig
    seed: int
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    share: dict[str, float]
    start_model: dict[str, str] | None = field(default=None, compare=False)
    masks: "Masks | None" = None

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 (hex) of version, config, seed, trainable, frozen and masks, if any."""
        canonical = json.dumps(self._essence(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _essence(self) -> dict[str, Any]:
        essence = {
            "version": VERSION,
            "config": self.config.selecting(),
            "seed": self.seed,
            "trainable": list(self.trainable),
            "frozen": list(self.frozen),
        }
        if self.masks:
            essence["masks"] = asdict(self.masks)
        return essence

    @property
    def masked(self) -> dict[str, int]:
        """Return the number of elements that learn, by the names of the parameters that learn in part."""
        return self.masks.learning if self.masks else {}

    def apply(self, model: PreTrainedModel) -> None:
        """
        Let the trainable parameters of a model learn and freeze all others.

        Call it before a wrapper (DDP, FSDP, DeepSpeed) renames parameters. With method `"fft"` what an earlier
        selection froze on the same model object learns again, and nothing else changes. Single elements are frozen by
        the trainers.

        Raises:
            [`HFTError`]: If the model lacks parameters that the selection names. It is then left as it was.
        """
        parameters, before = dict(named_parameters(model)), frozen_by_hft(model)
        if self.config.method == "fft":
            for name in before:
                parameters[name].requires_grad_(True)
            mark_frozen(model, ())
            return
        missing = [name for name in (*self.trainable, *self.frozen) if name not in parameters]
        if missing:
            raise HFTError(
                f"The selection names {missing[0]!r} (and {len(missing) - 1} more) that {type(model).__name__} does "
                "not have: draw a selection for this model."
            )
        trainable = set(self.trainable)
        others = {name for name, p in parameters.items() if not p.requires_grad} - before
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trainable)
        mark_frozen(model, parameters.keys() - trainable - others)

    def save(self, directory: str | Path) -> Path:
        """Write `hft_selection.json` into a folder, which is made if it does not exist, and return its path."""
        essence = self._essence()
        names = {key: essence.pop(key) for key in ("trainable", "frozen", "masks") if key in essence}
        about = {"share": self.share, "digest": self.digest, "start_model": self.start_model}
        path = Path(directory) / SELECTION_FILE
        with writing(path, resumes=False):
            write_json(path, essence | about | names)
        return path

    @classmethod
    def load(cls, directory: str | Path) -> "Selection":
        """Read the `hft_selection.json` of a folder, and reject one that has been changed."""
        from hft_trl.selection.masks import Masks

        path = Path(directory) / SELECTION_FILE
        try:
            content = read_object(path)
            if (version := content.get("version")) != VERSION:
                raise ValueError(f"it has version {version!r}, and this hft_trl reads version {VERSION}")
            selection = cls(
                config=HFTConfig(**content["config"]),
                seed=content["seed"],
                trainable=tuple(content["trainable"]),
                frozen=tuple(content["frozen"]),
                share=dict(content["share"]),
                start_model=content["start_model"],
                masks=Masks(**content["masks"]) if "masks" in content else None,
            )
            digest = content["digest"]
        except FileNotFoundError as error:
            raise HFTError(f"There is no {path}: give the folder of a model that was trained with hft_trl.") from error
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise HFTError(f"The selection {path} cannot be read: {type(error).__name__}: {error}") from error
        if selection.digest != digest:
            raise HFTError(
                f"The selection {path} was changed after it was saved: its content has the digest "
                f"{selection.digest[:12]}, not {str(digest)[:12]}. Take it from the model's own folder again."
            )
        return selection


def select(
    model: PreTrainedModel,
    config: HFTConfig,
    previous: Selection | None = None,
    calibrate: "Calibrate | None" = None,
) -> Selection:
    """
    Draw the parameters of a model that learn in a stage.

    What has `requires_grad=False` before, and was not frozen by a selection, stays frozen and does not count in the
    shares. Embedding, output head and final norm follow their own settings. Other parameters outside of the layers
    (projections of per-layer inputs, say) always learn, as everything outside of the layers does in the paper.

    Args:
        model ([`~transformers.PreTrainedModel`]): A decoder-only causal language model, on any device; the meta device
            too, except for strategy `"importance"`. It is not changed.
        config ([`HFTConfig`]): The settings. Method `"fft"` selects all that can learn, whatever the others say.
        previous ([`Selection`], *optional*): The selection that the start model was trained with. With
            `config.reselect` `"fresh"` the draw differs from that of the same seed without it (of whole layers, those
            that did not learn come first, as in the paper). `"same"` keeps which units of the layers learn,
            `"complement"` takes the others, so `config.ratio` has no effect. One of method `"fft"` counts as none.
        calibrate (`Callable[[list[str]], Squares]`, *optional*): For `config.importance` `"gradient_norm"` and
            `"wanda"`: returns what is measured on data by parameter name. The trainers have one.

    Raises:
        [`HFTError`]: If nothing can be selected or nothing learns, a pattern of `config.exclude` matches nothing,
            `previous` is of another model, or the importance cannot be measured.
    """
    if config.method == "fft":
        kept = frozen_by_user(model)
        units = [unit for unit in find_units(model) if kept.isdisjoint(unit.names)]
        return _selection(config, config.seed, units, set(units))
    units = find_units(model, config.exclude, frozen_by_user(model))
    seed, masks = config.seed, None
    if previous is not None and previous.config.method == "fft":
        previous = None
    fresh = previous is None or config.reselect == "fresh"
    if not fresh:
        learning, masks = _as_before(model, units, previous, config.reselect == "complement")
    else:
        if previous is not None:
            seed = _derived_seed(config.seed, previous)
        if config.strategy == "element" and config.ratio < 1:
            from hft_trl.selection.masks import draw_masks

            masks = draw_masks(units, config.ratio, seed, _sizes(model))
            learning = {unit for unit in units if unit.layer is not None}
        else:
            from hft_trl.selection.choose import choose

            learned, scores = _whole_layers_of(previous, units) if previous is not None else (), None
            if config.strategy == "importance":
                from hft_trl.selection.importance import unit_scores

                scores = unit_scores(model, units, config, calibrate)
            learning = set(choose(units, config.ratio, config.strategy, seed, learned, scores))
    learning |= {unit for unit in units if unit.layer is None and _learns_outside(unit, config)}
    elements = masks.learning if masks else {}
    if not any(elements.get(name, 1) for unit in learning for name in unit.names):
        how = f"hft.ratio {config.ratio:g}" if fresh else f"hft.reselect {config.reselect!r}"
        raise HFTError(
            f"nothing learns with {how} and nothing outside of the layers: "
            f"{'raise hft.ratio' if fresh else 'set hft.reselect to fresh'}, or let the embedding, the head or the "
            "final norm learn."
        )
    return _selection(config, seed, units, learning, masks)


def _selection(
    config: HFTConfig, seed: int, units: Sequence[Unit], learning: set[Unit], masks: "Masks | None" = None
) -> Selection:
    from hft_trl.selection.shares import category_shares

    trainable = tuple(sorted(name for unit in units if unit in learning for name in unit.names))
    frozen = tuple(sorted(name for unit in units if unit not in learning for name in unit.names))
    rows = category_shares(units, trainable, masks.learning if masks else None)
    share = {row.category: row.share for row in rows if row.category not in OUTER_CATEGORIES}
    return Selection(HFTConfig(**config.selecting()), seed, trainable, frozen, share, masks=masks)


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in named_parameters(model)}


def _learns_outside(unit: Unit, config: HFTConfig) -> bool:
    parts = {"embedding": "train_embeddings", "lm_head": "train_lm_head", "final_norm": "train_final_norm"}
    learns = unit.category not in parts or vars(config)[parts[unit.category]]
    return learns and (config.train_lm_head or not unit.tied)


def _as_before(
    model: PreTrainedModel, units: Sequence[Unit], previous: Selection, complement: bool
) -> tuple[set[Unit], "Masks | None"]:
    """Return the units and masks that learned in the start model's own stage, or their complement."""
    trainable, sizes = set(previous.trainable), _sizes(model)
    known, inner = trainable.union(previous.frozen), [unit for unit in units if unit.layer is not None]
    unknown = sorted(known - sizes.keys()) + [unit.names[0] for unit in inner if not known.issuperset(unit.names)]
    if unknown:
        raise HFTError(
            f"hft.reselect is {'complement' if complement else 'same'!r}, but the start model's selection and "
            f"{type(model).__name__} differ in {unknown[0]}: keep hft.exclude as it was, or set hft.reselect to fresh."
        )
    learning = {unit for unit in inner if (unit.names[0] in trainable) is not complement}
    if previous.masks is None:
        return learning, None
    masks = previous.masks.of(name for unit in units for name in unit.names)
    masks = masks.complement(sizes) if complement else masks
    return learning | {unit for unit in inner if unit.names[0] in masks.learning}, masks


def _whole_layers_of(previous: Selection, units: Sequence[Unit]) -> set[int]:
    """Return the layers that learned as a whole in the start model's own stage."""
    trainable = set(previous.trainable)
    frozen = {unit.layer for unit in units if unit.names[0] not in trainable}
    return {unit.layer for unit in units if unit.layer is not None} - frozen


def _derived_seed(seed: int, previous: Selection) -> int:
    digest = hashlib.sha256(f"{seed}:{previous.digest}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
