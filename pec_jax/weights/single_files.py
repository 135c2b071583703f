"""Transformers in the files of their publishers, and of ComfyUI, by diffusers' names.

Such a file has names of its own, projections joined into one matrix, and the modulation before the
last layer as (shift, scale), which diffusers has the other way round. It may hold text encoders
and an autoencoder as well; these are left alone. Nothing is read before it is asked for.

Source: stabilityai/sd3.5 (mmditx.py) and black-forest-labs/flux (model.py), whose modules these
names are; diffusers 0.42 (loaders/single_file_utils.py), whose conversion this is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pec_jax.weights.layouts import Place, Renamed, unwrapped
from pec_jax.weights.tensors import Tensors, WeightsError

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of the transformer, where it has one
_QUANTISED = re.compile(
    r"scaled_fp8|.*\.(scale_weight|scale_input|weight_scale|input_scale|comfy_quant|absmax"
    r"|nested_absmax|quant_map|quant_state\..*)"
)


class Rule(NamedTuple):
    """One kind of tensor. In names `#` is the number of a block, and `*` is weight or bias."""

    theirs: str
    ours: dict[str, tuple[int, ...]]  # name -> the parts of their tensor that make it up
    of: int = 1  # equal parts of their tensor, along its first axis


@dataclasses.dataclass(frozen=True)
class Original:
    """The names of a network in its publisher's file.

    Attributes:
        blocks: what the names of its blocks begin with, and no other network's do.
        rules: number of the last block -> rules, of which the first that fits a name holds.
    """

    blocks: str
    rules: Callable[[int], Sequence[Rule]]

    def recognises(self, tensors: Tensors) -> bool:
        """Whether a file's names are these."""
        return any(name.startswith(self.blocks) for name in tensors)

    def to_diffusers(self, tensors: Tensors) -> Tensors:
        """The same tensors by diffusers' names; what no rule knows keeps its own.

        Args:
            tensors: by either names.
        """
        if not self.recognises(tensors):
            return tensors
        block = re.compile(rf"{re.escape(self.blocks)}(\d{{1,4}})\..*")
        numbers = (int(match[1]) for match in map(block.fullmatch, tensors) if match)
        last = max(numbers, default=0)
        rules = [(re.compile(_pattern(rule.theirs)), rule) for rule in self.rules(last)]
        places: dict[str, Place] = {}
        for name in tensors:
            places |= _places(name, rules)
        return Renamed(tensors, places)


def _pattern(theirs: str) -> str:
    return re.escape(theirs).replace(r"\#", r"(?P<block>\d+)").replace(r"\*", "(?P<kind>.*)")


def _places(name: str, rules: Sequence[tuple[re.Pattern[str], Rule]]) -> dict[str, Place]:
    """Our names for (parts of) a tensor."""
    for pattern, rule in rules:
        if match := pattern.fullmatch(name):
            found = match.groupdict()
            return {
                ours.replace("#", found.get("block", "")).replace("*", found.get("kind", "")): (
                    Place(name, parts, rule.of)
                )
                for ours, parts in rule.ours.items()
            }
    return {name: Place(name)}


def transformer_tensors(tensors: Tensors) -> Tensors:
    """The transformer's tensors of a file, without what others have put before their names.

    Raises:
        WeightsError: they are quantised with scales, which is not supported.
    """
    for prefix in PREFIXES:
        if inside := [name for name in tensors if name.startswith(prefix)]:
            tensors = Renamed(tensors, {n.removeprefix(prefix): Place(n) for n in inside})
    if quantised := next(filter(_QUANTISED.fullmatch, tensors), None):
        raise WeightsError(
            f"{tensors.file(quantised)}: holds quantised weights ({quantised!r} is one of their "
            "scales), which are not supported; use the file in bf16, fp16 or plain fp8"
        )
    return unwrapped(tensors)


def _same(theirs: str, ours: str) -> Rule:
    return Rule(theirs, {ours: (0,)})


def _split(theirs: str, *ours: str) -> Rule:
    """Of matrices joined into one, such as queries, keys and values."""
    return Rule(theirs, {name: (i,) for i, name in enumerate(ours)}, len(ours))


def _swapped(theirs: str, ours: str) -> Rule:
    """(shift, scale) -> (scale, shift)."""
    return Rule(theirs, {ours: (1, 0)}, 2)


def _mlp(theirs: tuple[str, str], ours: str) -> list[Rule]:
    return [_same(f"{theirs[0]}.*", f"{ours}.0.proj.*"), _same(f"{theirs[1]}.*", f"{ours}.2.*")]


def _sd3(last: int) -> list[Rule]:
    x, context, ours = (
        "joint_blocks.#.x_block",
        "joint_blocks.#.context_block",
        "transformer_blocks.#",
    )
    embedder = "time_text_embed.{}_embedder.linear_{}.*"
    attentions = (
        (f"{x}.attn", f"{ours}.attn", "to_{}", "norm_{}", "to_out.0"),
        (f"{x}.attn2", f"{ours}.attn2", "to_{}", "norm_{}", "to_out.0"),
        (f"{context}.attn", f"{ours}.attn", "add_{}_proj", "norm_added_{}", "to_add_out"),
    )
    rules = [
        _same("pos_embed", "pos_embed.pos_embed"),
        _same("x_embedder.proj.*", "pos_embed.proj.*"),
        *(
            _same(f"{theirs}_embedder.mlp.{2 * i}.*", embedder.format(name, i + 1))
            for theirs, name in (("t", "timestep"), ("y", "text"))
            for i in range(2)
        ),
        _same("final_layer.linear.*", "proj_out.*"),
        _swapped("final_layer.adaLN_modulation.1.*", "norm_out.linear.*"),
        _same(f"{x}.adaLN_modulation.1.*", f"{ours}.norm1.linear.*"),
        # The text's part of the last block feeds nothing but its attention.
        _swapped(
            f"{context}.adaLN_modulation.1.*".replace("#", str(last)),
            f"{ours}.norm1_context.linear.*".replace("#", str(last)),
        ),
        _same(f"{context}.adaLN_modulation.1.*", f"{ours}.norm1_context.linear.*"),
        *_mlp((f"{x}.mlp.fc1", f"{x}.mlp.fc2"), f"{ours}.ff.net"),
        *_mlp((f"{context}.mlp.fc1", f"{context}.mlp.fc2"), f"{ours}.ff_context.net"),
    ]
    for theirs, name, projection, norm, out in attentions:
        rules += [
            _split(f"{theirs}.qkv.*", *(f"{name}.{projection.format(p)}.*" for p in "qkv")),
            *(_same(f"{theirs}.ln_{p}.*", f"{name}.{norm.format(p)}.*") for p in "qk"),
            _same(f"{theirs}.proj.*", f"{name}.{out}.*"),
        ]
    return rules


def _flux(last: int) -> list[Rule]:
    del last
    double, single = "double_blocks.#", "single_blocks.#"
    ours, ours_single = "transformer_blocks.#", "single_transformer_blocks.#"
    streams = (
        ("img", "", "to_{}", "norm_{}", "to_out.0"),
        ("txt", "_context", "add_{}_proj", "norm_added_{}", "to_add_out"),
    )
    rules = [
        *(
            _same(
                f"{theirs}_in.{layer}_layer.*",
                f"time_text_embed.{name}_embedder.linear_{number}.*",
            )
            for theirs, name in (("time", "timestep"), ("vector", "text"), ("guidance",) * 2)
            for number, layer in enumerate(("in", "out"), 1)
        ),
        _same("txt_in.*", "context_embedder.*"),
        _same("img_in.*", "x_embedder.*"),
        _same("final_layer.linear.*", "proj_out.*"),
        _swapped("final_layer.adaLN_modulation.1.*", "norm_out.linear.*"),
        _same(f"{single}.modulation.lin.*", f"{ours_single}.norm.linear.*"),
        # Queries, keys, values, and an MLP four times as wide.
        Rule(
            f"{single}.linear1.*",
            {f"{ours_single}.attn.to_{p}.*": (i,) for i, p in enumerate("qkv")}
            | {f"{ours_single}.proj_mlp.*": (3, 4, 5, 6)},
            7,
        ),
        _same(f"{single}.linear2.*", f"{ours_single}.proj_out.*"),
        _same(f"{single}.norm.query_norm.scale", f"{ours_single}.attn.norm_q.weight"),
        _same(f"{single}.norm.key_norm.scale", f"{ours_single}.attn.norm_k.weight"),
    ]
    for stream, suffix, projection, norm, out in streams:
        attn, mlp = f"{double}.{stream}_attn", f"{double}.{stream}_mlp"
        projections = (f"{ours}.attn.{projection.format(p)}.*" for p in "qkv")
        rules += [
            _same(f"{double}.{stream}_mod.lin.*", f"{ours}.norm1{suffix}.linear.*"),
            _split(f"{attn}.qkv.*", *projections),
            _same(f"{attn}.norm.query_norm.scale", f"{ours}.attn.{norm.format('q')}.weight"),
            _same(f"{attn}.norm.key_norm.scale", f"{ours}.attn.{norm.format('k')}.weight"),
            _same(f"{attn}.proj.*", f"{ours}.attn.{out}.*"),
            *_mlp((f"{mlp}.0", f"{mlp}.2"), f"{ours}.ff{suffix}.net"),
        ]
    return rules


SD3 = Original("joint_blocks.", _sd3)
FLUX = Original("double_blocks.", _flux)
