"""What a train step costs on pods you do not have: `python benchmarks/scaling.py --results=DIR`.

Compiles Stable Diffusion 3.5 Medium (LoRA and all weights) and FLUX.1-dev (LoRA) with PEC for TPU
slices of several sizes, at the same work per chip, and writes the table of docs/scaling.md. One
process per row; finished rows lie in --results and are skipped, so that the command can be killed
and restarted. Minutes per row on two cores. Needs `pip install -e '.[tpu]'`.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for this directory by its name

from benchmarks.ahead import asked  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
MARKS = ("<!-- table, made by benchmarks/scaling.py -->\n", "<!-- end -->")
GROUPS_PER_CHIP = 3  # Flow-GRPO's 48 groups on 16 chips

TOPOLOGIES = {  # chips -> grid
    "v5e": {16: "4x4", 64: "8x8", 256: "16x16"},
    "v6e": {16: "4x4", 64: "8x8"},
    "v5p": {16: "2x2x4", 64: "4x4x4", 512: "8x8x8"},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One compilation."""

    model: str
    config: str
    trainable: str  # lora | full
    fsdp: int  # chips that the parameters are split over; the rest of the chips is `data`
    chip: str
    chips: int
    remat: str = "full"
    pixels: int = 512

    @property
    def name(self) -> str:
        """Names the row's file."""
        return f"{self.config}_{self.trainable}_{self.pixels}px_{self.chip}-{self.chips}"

    @property
    def command(self) -> list[str]:
        """Arguments of `python -m pec_jax.aot`."""
        return [
            f"--config=configs/{self.config}.py",
            f"--topology={self.chip}:{TOPOLOGIES[self.chip][self.chips]}",
            f"--config.batch.groups={GROUPS_PER_CHIP * self.chips}",
            f"--config.trainable.mode={self.trainable}",
            "--config.mesh.data=-1",
            f"--config.mesh.fsdp={self.fsdp}",
            # Where weights are gathered for every piece, fewer and larger ones.
            f"--config.batch.rollout_images={1 if self.fsdp == 1 else 4}",
            f"--config.model.remat={self.remat}",
            f"--config.model.height={self.pixels}",
            f"--config.model.width={self.pixels}",
        ]


def rows() -> list[Row]:
    """All of the table, the smallest pods first."""
    remat = {"v5e": "full", "v6e": "dots", "v5p": "dots"}  # what the memory allows
    sd3 = [
        Row("SD3.5-M", "sd3_pec", trainable, fsdp, chip, chips, remat[chip])
        for trainable, fsdp in (("lora", 1), ("full", 16))
        for chip, grids in TOPOLOGIES.items()
        for chips in grids
    ]
    large = Row("SD3.5-M", "sd3_pec", "lora", 1, "v5p", 16, "full", pixels=1024)
    flux = [
        Row("FLUX.1-dev", "flux_pec", "lora", 4, chip, chips)
        for chip in ("v5p", "v6e")
        for chips in (16, 64)
    ]
    return sorted((*sd3, large, *flux), key=lambda row: row.chips)


def compiled(row: Row, results: Path) -> dict[str, Any]:
    """What `aot` says of a row, or said before."""
    return asked(row.command, results / f"{row.name}.json")


def cells(row: Row, found: dict) -> list[str]:
    """One line of the table."""
    start = [
        row.model,
        row.trainable,
        str(row.pixels),
        f"{row.chip}-{row.chips}",
        str(row.fsdp),
        row.remat,
    ]
    if "bytes_per_chip" not in found:
        return [*start, "", "", f"no, of {found['hbm_bytes'] / 1e9:.1f}", *[""] * 8]
    memory, bound = found["bytes_per_chip"], found["roofline"]
    moved = sum(kind["bytes"] for kind in found["collectives"].values())
    return [
        *start,
        f"{(memory['arguments'] + memory['unread']) / 1e9:.2f}",
        f"{memory['temporaries'] / 1e9:.2f}",
        f"{memory['peak'] / 1e9:.2f} of {found['hbm_bytes'] / 1e9:.1f}",
        f"{found['flops']['analytic'] / 1e15:.2f}",
        f"{moved / 1e9:.0f}",
        f"{bound['seconds']:.0f}",
        bound["bound_by"],
        *_expected(found.get("schedule")),
        f"{found['compile_seconds']:.0f}",
    ]


def _expected(schedule: dict | None) -> list[str]:
    """Of rows that were compiled before the compiler's estimate was read: nothing."""
    if not schedule:
        return ["–", "–", "–"]
    return [
        f"{schedule['seconds']:.0f}",
        f"{schedule['products']:.0f}",
        f"{100 * schedule['mfu']:.0f}%",
    ]


HEADER = (
    "model", "trains", "px", "chips", "fsdp", "remat", "resident GB", "temporary GB", "peak GB",
    "PFLOP", "collectives GB", "bound s", "bound by", "schedule s", "products s", "MFU there",
    "compiled in s",
)  # fmt: skip


def write_table(lines: list[list[str]]) -> None:
    """Puts the table between its marks in the page."""
    table = [
        " | ".join(HEADER),
        "|".join(
            ["---"] * 2 + ["---:", "---", "---:", "---"] + ["---:"] * 6 + ["---"] + ["---:"] * 4
        ),
    ]
    table += [" | ".join(line) for line in lines]
    body = "".join(f"| {line} |\n" if "---" not in line else f"|{line}|\n" for line in table)
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1], 1)[1]
    PAGE.write_text(before + MARKS[0] + body + MARKS[1] + after, encoding="utf-8")


def main(argv: list[str]) -> None:
    """Compiles what is missing, then writes the table."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    results = Path(_RESULTS.value).absolute()
    results.mkdir(parents=True, exist_ok=True)
    wanted = [row for row in rows() if all(part in row.name for part in _ONLY.value)]
    for row in wanted:
        compiled(row, results)
    done = [row for row in rows() if (results / f"{row.name}.json").exists()]
    done.sort(key=lambda row: (row.model != "SD3.5-M", row.trainable == "full", row.chip))
    write_table([cells(row, compiled(row, results)) for row in done])


if __name__ == "__main__":
    _RESULTS = flags.DEFINE_string("results", "runs/scaling", "Where finished rows lie.")
    _ONLY = flags.DEFINE_list("only", [], "Parts of names, such as sd3,lora,v5e-16.")
    app.run(main)
