"""`python -m fusednorm coverage TARGET..`: what `replace_norms` does with the norms of models.

A target is `MODULE:CALLABLE`, which is called without arguments for a model, or one of

    transformers    transformers:MODEL_TYPE   with few layers and small sizes where it allows that
    timm            timm:MODEL
    diffusers       diffusers:CLASS
    open_clip       open_clip:MODEL
    x_transformers  x_transformers:OPTION     a decoder with one of the options about norms

of which the first in each line stands for all that the library has. Models are made on the meta
device: no weight is loaded, and nothing runs but the probe.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import nn

from fusednorm.adaptive import AdaptiveNorm
from fusednorm.recognition import Probed
from fusednorm.replace import Report, _replace
from fusednorm.swapped import Swap

_Build: TypeAlias = Callable[[], Any]

# How norms are used: the dtypes of input and weight, and the device of the autocast around it.
_USES = {
    "in float32": (torch.float32, torch.float32, None),
    "in bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "bfloat16 autocast on cuda, bfloat16 weights": (torch.bfloat16, torch.bfloat16, "cuda"),
    "bfloat16 autocast on cuda, float32 weights": (torch.bfloat16, torch.float32, "cuda"),
}
_LIBRARIES = {
    **{name: name for name in ("torch", "fusednorm", "transformers", "timm", "diffusers")},
    **{"open_clip": "open_clip_torch", "x_transformers": "x-transformers"},
}
_NORMALISES = re.compile(r"\b(F|functional|torch)\.(layer_norm|rms_norm|rsqrt)\(")


def main(targets: list[str]) -> int:
    """Print a line for each model and the sums; return 1 if `replace_norms` raised."""
    if not targets:
        print(__doc__)
        return 2
    tallies: dict[str, _Tally] = {}
    probed: Probed = {}
    try:
        for target in targets:
            library = target.partition(":")[0]
            tally = tallies.setdefault(library if library in _BUILDERS else "", _Tally(probed))
            for name, build in _models(target):
                print(f"{name:40} {tally.add(build)}", flush=True)
    except KeyboardInterrupt:
        print("interrupted: the sums are those of the models above")
    versions = {name: version(name) for spec, name in _LIBRARIES.items() if find_spec(spec)}
    print("\n" + ", ".join(" ".join(pair) for pair in versions.items()))
    for library, tally in tallies.items():
        print(f"\n## {library}\n{tally}" if library else tally)
    return int(any(tally.models["replace_norms raised"] for tally in tallies.values()))


class _Tally:
    """The sums over models, and what the probe has found out so far."""

    def __init__(self, probed: Probed) -> None:
        self.models: Counter[str] = Counter()
        self.norms: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.by_itself: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.unreported: Counter[str] = Counter()
        self._probed = probed

    def add(self, build: _Build) -> str:
        """Swap the norms of a model; return what to say about it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with torch.device("meta"):
                    model = build()
            except Exception as error:
                self.models["not built"] += 1
                return f"not built: {type(error).__name__}: {error}".splitlines()[0][:100]
            self.models["built"] += 1
            before = {name: type(module) for name, module in model.named_modules()}
            try:
                report = _replace(model, None, None, self._probed)
            except Exception as error:
                self.models["replace_norms raised"] += 1
                return f"RAISED {type(error).__name__}: {error}"
        left = self._left(model, report)
        if report.swapped or left:
            self.models["with norms"] += 1
            self.models["with all norms swapped"] += not left
        classes = {n: type(m) for n, m in model.named_modules(remove_duplicate=False)}
        for name in report.swapped:
            self._serve(classes[name])
        self._unreported(model, report, before)
        return f"{len(report.swapped):4} swapped, {left:4} left"

    def _left(self, model: nn.Module, report: Report) -> int:
        """Count what was left by reason, and return how many norms that is."""
        left = 0
        for name, reason in report.left:
            cls = type(model.get_submodule(name)).__name__
            left += 1
            self.reasons[f"{cls}: {reason.rpartition(': ')[2]}"] += 1
        for name, what in report.others:
            self.others[f"{type(model.get_submodule(name)).__name__}: {what}"] += 1
        self.norms["left"] += left
        return left

    def _serve(self, cls: type[nn.Module]) -> None:
        """Count the uses in which a swapped norm is run fused: all of them for torch's own."""
        if issubclass(cls, AdaptiveNorm):
            self.norms["modulated in one call"] += 1
            return
        swap: Swap | None = getattr(cls, "_fusednorm_swap", None)
        self.norms["swapped"] += 1
        unserved = [use for use, kinds in _USES.items() if swap and not _is_served(swap, *kinds)]
        self.served.update(use for use in _USES if use not in unserved)
        if swap and unserved:
            self.by_itself[f"{swap.original.__name__}: {'; '.join(unserved)}"] += 1

    def _unreported(self, model: nn.Module, report: Report, classes: dict[str, type]) -> None:
        """Count the classes whose forward normalises and that the report does not have."""
        known = {*report.swapped, *dict(report.left), *dict(report.others)}
        for name, cls in classes.items():
            if name not in known and not cls.__module__.startswith("torch."):
                try:
                    source = inspect.getsource(cls.forward)  # type: ignore[attr-defined]
                except (AttributeError, OSError, TypeError):
                    continue
                if _NORMALISES.search(source):
                    self.unreported[f"{cls.__module__}.{cls.__qualname__}"] += 1

    def __str__(self) -> str:
        """Return the sums."""
        rows = [f"{count:7} models {what}" for what, count in self.models.items()]
        rows += [f"{count:7} norms {what}" for what, count in self.norms.items()]
        rows += ["", "Of those swapped, run fused:"]
        rows += [f"{count:7} {use}" for use, count in self.served.items()]
        rows += ["", "Swapped, and by their own forward where it rounds as no kernel does:"]
        rows += [f"{count:7} {uses}" for uses, count in self.by_itself.most_common()]
        rows += ["", "Left, by class and reason:"]
        rows += [f"{count:7} {reason}" for reason, count in self.reasons.most_common()]
        rows += ["", "Called a norm, and no norm of a row:"]
        rows += [f"{count:7} {what}" for what, count in self.others.most_common()]
        rows += ["", "Forwards that normalise on the way, in modules that are no norms:"]
        rows += [f"{count:7} {name}" for name, count in self.unreported.most_common()]
        return "\n".join(rows)


def _is_served(swap: Swap, dtype: torch.dtype, weight: torch.dtype, autocast: str | None) -> bool:
    """Return whether a swapped norm is run fused in a use."""
    mix = (dtype, weight if swap.held.weight else None)
    return mix in dict(swap.rules) if autocast is None else (autocast, mix) in dict(swap.autocast)


def _models(target: str) -> Iterator[tuple[str, _Build]]:
    """Yield the models that a target stands for."""
    library, _, name = target.partition(":")
    if library in _BUILDERS:
        yield from _BUILDERS[library](name)
    else:
        yield target, getattr(importlib.import_module(library), name)


def _timm(name: str) -> Iterator[tuple[str, _Build]]:
    timm = importlib.import_module("timm")
    for model in [name] if name else timm.list_models():
        yield f"timm:{model}", lambda model=model: timm.create_model(model)  # type: ignore[misc]


def _diffusers(name: str) -> Iterator[tuple[str, _Build]]:
    diffusers = importlib.import_module("diffusers")
    for model in [name] if name else sorted(dir(importlib.import_module("diffusers.models"))):
        cls = getattr(diffusers, model, None)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            names = inspect.signature(cls.__init__).parameters
            few = {key: 1 for key in names if key in ("num_layers", "num_single_layers")}
            yield f"diffusers:{model}", lambda cls=cls, few=few: cls(**few)  # type: ignore[misc]


def _open_clip(name: str) -> Iterator[tuple[str, _Build]]:
    library = importlib.import_module("open_clip")
    for model in [name] if name else library.list_models():
        config = {**library.get_model_config(model)}
        custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
        cls = library.CustomTextCLIP if custom else library.CLIP
        cls = library.CoCa if "multimodal_cfg" in config else cls

        def build(cls: Any = cls, config: dict[str, Any] = config) -> Any:
            return cls(**config)

        yield f"open_clip:{model}", build


def _x_transformers(name: str) -> Iterator[tuple[str, _Build]]:
    library = importlib.import_module("x_transformers")
    layers = importlib.import_module("x_transformers.x_transformers").AttentionLayers
    options = [
        key
        for key, parameter in inspect.signature(layers.__init__).parameters.items()
        if parameter.default is False and "norm" in key
    ]
    for option in [name] if name else ["", *options]:
        given = {option: True} if option else {}
        if "adaptive" in option:
            given["dim_condition"] = 64  # type: ignore[assignment]

        def build(given: dict[str, Any] = given) -> Any:
            decoder = library.Decoder(dim=64, depth=2, heads=4, **given)
            return library.TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=decoder)

        yield f"x_transformers:{option or 'default'}", build


def _transformers(name: str) -> Iterator[tuple[str, _Build]]:
    auto = importlib.import_module("transformers.models.auto")
    for model in [name] if name else sorted(auto.CONFIG_MAPPING.keys()):

        def build(model: str = model) -> Any:
            config, error = auto.CONFIG_MAPPING[model], None
            for sizes in ({**_FEW, **_NARROW}, _FEW, {}):  # some do not fit together
                try:
                    return _of_config(auto, _small(config(), sizes))
                except Exception as raised:  # noqa: PERF203
                    error = error or raised
            raise error or AssertionError

        yield f"transformers:{model}", build


def _of_config(auto: Any, config: Any) -> Any:
    """Return the model of a config, also where it is a part of others, without an entry."""
    if type(config) in auto.MODEL_MAPPING:
        return auto.AutoModel.from_config(config)
    path = type(config).__module__.replace("configuration_", "modeling_")
    for cls in vars(importlib.import_module(path)).values():
        if getattr(cls, "config_class", None) is type(config) and "PreTrained" not in cls.__name__:
            return cls(config)
    return auto.AutoModel.from_config(config)  # which says what is wrong


_FEW = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
}
_NARROW = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "head_dim": 16,
}


def _small(config: Any, sizes: dict[str, int]) -> Any:
    """Return a config of transformers, and those within it, with other sizes."""
    for key, value in vars(config).items():
        if type(value) is int and key in sizes:
            setattr(config, key, sizes[key])
        elif hasattr(value, "model_type"):
            _small(value, sizes)
    return config


_BUILDERS: dict[str, Callable[[str], Iterator[tuple[str, _Build]]]] = {
    **{"transformers": _transformers, "timm": _timm, "diffusers": _diffusers},
    **{"open_clip": _open_clip, "x_transformers": _x_transformers},
}
