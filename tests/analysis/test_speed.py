"""The speed on the result page: what the committed table holds, and what nobody has measured."""

import json
from pathlib import Path

from analysis.speed import NOT_YET, speed
from experiments.bench.rows import BLOCKS, ROWS

MACHINE = {
    "device": "cpu", "cpu": "AMD EPYC", "cores": 2, "threads": 1, "units_for_16_bits": [], "widened_products": True,
    "python": "3.11.7", "packages": {"torch": "2.13.0", "diffusers": "0.42.1", "peft": "0.21.2"},
    "commit": "0123456789abcdef", "measured": "2026-11-30",
}  # fmt: skip
SIDE = {"images_per_s": 2.5, "evaluations_per_image": {"student": 2.0, "teacher": 46.0}}


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 0.1, "high": median + 0.1}


def row(number: int, value: float, **more: object) -> dict[str, object]:
    given = ROWS[number]
    names = {"name": given.name, "work": given.work, "wanted": given.wanted, "kind": given.kind}
    return names | {given.kind: spread(value)} | more


def test_a_page_shows_what_the_file_holds(tmp_path: Path) -> None:
    reached = row(0, 3.25, efficiency=spread(0.9), ours=SIDE, reference=SIDE, time={"teacher": 0.8})
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"cpu": {"machine": MACHINE, "repeats": 5, "rows": [reached, row(10, 2.5)]}}))
    text = speed(file)
    assert f"| {ROWS[0].work} | **3.25 (3.15-3.35)** | >= 3 | 0.9 (0.8-1) |" in text
    assert f"| {ROWS[10].work} | 2.5 s (2.4-2.6), not reached | < 2 s |  |" in text
    assert f"| {ROWS[1].work} | {NOT_YET} | >= 3 | |" in text, "a row that was left out"
    work = "2.5 images/s; evaluations an image: student 2, teacher 46"
    assert f"| {ROWS[0].work} | {work} | {work} | teacher 80% |" in text
    assert "AMD EPYC, 2 cores, units for 16-bit numbers: none (in bf16 both sides multiply" in text
    assert "commit 0123456789, 2026-11-30. Medians of 5 repeats" in text
    assert text.endswith(f"**On a GPU:** {NOT_YET}.") and BLOCKS[0].work not in text


def test_a_gpu_adds_its_peak_and_the_blocks(tmp_path: Path) -> None:
    gpu = {"tflops": 120.0, "mfu": 0.121, "peak_gb": 3.2}
    one = {"seconds": spread(1.0), "images_per_s": 5.0, "tflops": 400.0, "mfu": None, "peak_gb": 12.0}
    block = {"name": "flux2_dev", "work": BLOCKS[1].work, "wanted": None, "kind": "speed"}
    block |= {kind: {"forward": one, "training": one} for kind in ("double", "single")}
    machine = MACHINE | {"device": "NVIDIA H200", "widened_products": False, "units_for_16_bits": ["amx_bf16"]}
    step = row(0, 3.25, efficiency=spread(0.9), ours=SIDE, reference=SIDE, **gpu)
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"cuda": {"machine": machine, "repeats": 5, "rows": [step, block]}}))
    text = speed(file)
    assert text.startswith(f"**On one core of a CPU:** {NOT_YET}.") and "NVIDIA H200 beside AMD EPYC" in text
    assert "teacher 46<br>120 TFLOP/s, MFU 12%, peak 3.2 GB" in text and f"| {BLOCKS[0].work} | {NOT_YET} |" in text
    assert "double forward  5 images/s; 400 TFLOP/s, MFU unknown, peak 12 GB<br>double training" in text
