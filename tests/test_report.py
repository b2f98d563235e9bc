import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from sb3_safe import cli, report
from sb3_safe.callbacks import write_json_lines
from sb3_safe.report import PANELS, write_report

SVG = "{http://www.w3.org/2000/svg}"


def run(phases: bool = True) -> list[dict[str, float]]:
    """A run with every column that a report can show."""
    columns = {name for panel in PANELS for name in (panel.column, panel.band, panel.limit, panel.raw) if name}
    rows = [{name: 0.1 * step for name in sorted(columns)} for step in range(12)]
    for step, row in enumerate(rows):
        row |= {"timesteps": 100.0 * (step + 1), "seconds": float(step), "episodes": 5, "reward_std": 0.5}
        if phases:
            row["phase"] = float(min(step // 4, 2))
    return rows


def figures(page: str) -> dict[str, str]:
    """The SVG text of each figure, by id."""
    found = re.findall(r'<figure id="(\w+)">.*?src="data:image/svg\+xml;base64,([^"]+)"', page, flags=re.DOTALL)
    return {name: base64.b64decode(data).decode() for name, data in found}


def test_a_report_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = write_report({"one": run()}, tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)\s*=\s*["\'](?!data:|#)', page)
    assert not re.search(r"<script|<link|@import|url\(", page)
    for svg in figures(page).values():
        assert not re.findall(r'(?:src|href)\s*=\s*["\'](?!data:|#)', svg)


def test_a_report_has_every_plot_whose_column_is_there(tmp_path: Path) -> None:
    drawn = figures(write_report({"one": run()}, tmp_path / "all.html").read_text())
    assert list(drawn) == [panel.column for panel in PANELS]
    for svg in drawn.values():
        ElementTree.fromstring(svg)
    few = [{"timesteps": 1.0, "reward": 2.0}, {"timesteps": 2.0, "entropy": 0.5}]
    assert list(figures(write_report({"few": few}, tmp_path / "few.html").read_text())) == ["reward", "entropy"]


def test_phases_are_shaded_behind_the_curves(tmp_path: Path) -> None:
    with_phases = figures(write_report({"one": run()}, tmp_path / "with.html").read_text())
    without = figures(write_report({"one": run(phases=False)}, tmp_path / "without.html").read_text())
    for name in with_phases:
        # Colours of WARMUP, CLIMBING and PLATEAU, which the run goes through.
        for color in ("#d9d9d9", "#cfe8cf", "#ffe3b8"):
            assert color in with_phases[name]
            assert color not in without[name]


def test_what_a_controller_of_ones_own_calls_a_phase_is_not_shaded(tmp_path: Path) -> None:
    rows = [row | {"phase": 7.0} for row in run(phases=False)]
    page = write_report({"one": rows}, tmp_path / "report.html").read_text()
    assert figures(page) == figures(write_report({"one": run(phases=False)}, tmp_path / "without.html").read_text())


def test_runs_are_compared_side_by_side(tmp_path: Path) -> None:
    page = write_report({"safe": run(), "ppo": run(phases=False)}, tmp_path / "report.html").read_text()
    assert "<th></th><th>safe</th><th>ppo</th>" in page
    assert all("#1f77b4" in svg and "#ff7f0e" in svg for svg in figures(page).values())
    assert "phases are those of safe" in page


def test_the_summary_compares_the_first_tenth_with_the_last(tmp_path: Path) -> None:
    # Twenty rewards 0, 0.1, ... 1.9: the means of the first two and of the last two.
    rows = [{"timesteps": 1.0 + step, "reward": 0.1 * step} for step in range(20)]
    page = write_report({"one": rows}, tmp_path / "report.html").read_text()
    assert re.search(r"<td>reward</td><td class=\"number\">0\.05 → 1\.85</td>", page)


def test_whatever_texts_and_names_contain_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>'
    samples = [
        {"timesteps": step, "prompt": evil + "p", "completion": f"{evil}{step}", "reward": 0.5} for step in (0, 5, 9)
    ]
    rows = [{"timesteps": 1.0, "reward": 2.0, "phase": 0.0}]
    page = write_report(
        {evil: rows, "b": rows}, tmp_path / "r.html", samples, title=evil, evaluation={evil: (1.25, 2.5)}
    ).read_text()
    assert "<script" not in page
    escaped = "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;"
    assert f"{escaped}0" in page and f"{escaped}9" in page
    assert f"{escaped}5" not in page, "only the first and the last text of a prompt are shown"
    assert '<td class="number">1.25</td><td class="number">2.5</td>' in page


@pytest.mark.parametrize("name", ["$x", "a$b$c", r"$\frac$", r"\$1", "$_$"])
def test_a_name_is_drawn_as_it_is_whatever_formula_it_would_be(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters, not their outlines
    page = write_report({name: run(), "b": run()}, tmp_path / "report.html").read_text()
    labels = [text.text for text in ElementTree.fromstring(figures(page)["reward"]).iter(f"{SVG}text")]
    assert f"reward ({name})" in labels


def test_a_report_of_the_same_run_is_the_same_file(tmp_path: Path) -> None:
    rows = [{"timesteps": 1.0, "reward": 2.0, "reward_std": 1.0}, {"timesteps": 2.0, "reward": 3.0, "reward_std": 0.5}]
    first, again = (write_report({"one": rows}, tmp_path / f"{i}.html").read_bytes() for i in range(2))
    assert first == again


def test_a_report_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        write_report({"one": []}, tmp_path / "report.html")


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (run(), r"runs must be a dict .*, got a list"),
        ({"a": run(), "b": [{"timesteps": 1.0}, {"reward": 1.0}]}, r"runs\['b'\]: row 2 .*'timesteps', got {'reward'"),
        ({"a": [{"timesteps": 1.0, "reward": "high"}]}, r"runs\['a'\]: row 1 must be a dict of numbers"),
        ({"a": {"timesteps": 1.0}}, r"runs\['a'\]: row 1 must be a dict"),
        ({"a": "stability.jsonl"}, r"runs\['a'\]: row 1 must be a dict"),
    ],
)
def test_rows_that_no_callback_collects_are_named(runs: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        write_report(runs, tmp_path / "report.html")


def test_rows_may_hold_numbers_of_numpy(tmp_path: Path) -> None:
    rows = [{"timesteps": np.int64(step), "reward": np.float32(step)} for step in range(3)]
    assert list(figures(write_report({"a": rows}, tmp_path / "report.html").read_text())) == ["reward"]


def test_a_missing_matplotlib_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-safe\[report\]'"):
        write_report({"one": run()}, tmp_path / "report.html")


def make_folder(folder: Path) -> str:
    rows = [{"timesteps": 10.0 * step, "reward": 0.5 * step} for step in range(1, 6)]
    write_json_lines(folder / "stability.jsonl", rows)
    return str(folder)


def test_the_command_compares_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_folder(tmp_path / name) for name in ("safe", "ppo")]
    output = tmp_path / "out" / "both.html"
    assert cli.main(["report", *folders, "-o", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert "<th></th><th>safe</th><th>ppo</th>" in output.read_text()


def test_the_package_run_as_a_module_is_the_command() -> None:
    command = [sys.executable, "-m", "sb3_safe", "report", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: sb3-safe report")


def test_the_command_shows_the_samples_of_a_single_run(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "demo")
    sample = {"timesteps": 0, "prompt": "Once", "completion": " upon a time", "reward": 1.5}
    (tmp_path / "demo" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    output = tmp_path / "report.html"
    assert cli.main(["report", folder, "-o", str(output)]) == 0
    assert " upon a time" in output.read_text()


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_folder(tmp_path / seed / "run") for seed in ("a", "b")]
    output = tmp_path / "report.html"
    assert cli.main(["report", *folders, "-o", str(output)]) == 0
    assert all(f"<th>{folder}</th>" in output.read_text() for folder in folders)


def test_a_folder_that_is_named_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    for again in ("a", "a/", "./a", str(tmp_path / "a"), "link"):
        assert cli.main(["report", "a", again]) == 1
        assert f"a and {Path(again)} are the same folder" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("output", ["", ".", "sub", "file/report.html"])
def test_an_output_that_cannot_be_written_is_named_before_anything_is_drawn(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "run")
    (tmp_path / "sub").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "_figures", None)
    assert cli.main(["report", folder, "-o", output]) == 1
    said = "'file'" if output.startswith("file") else f"--output must be a file, and {str(Path(output))!r} is a folder"
    assert said in capsys.readouterr().err


def test_errors_of_the_command_name_the_folder_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    assert f"{tmp_path / 'nowhere'} is not a folder" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path} has no stability.jsonl" in capsys.readouterr().err
    for rows in ("", '{"timesteps": 1'):
        (tmp_path / "stability.jsonl").write_text(rows)
        assert cli.main(["report", str(tmp_path)]) == 1
        assert "stability.jsonl has no complete row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("stability.jsonl", '{"reward": 1.0}'),
        ("stability.jsonl", "[1, 2]"),
        ("stability.jsonl", '{"timesteps": 20.0, "reward": null}'),
        ("samples.jsonl", '{"timesteps": 0, "completion": "", "reward": 1.0}'),
        ("samples.jsonl", '{"timesteps": 0, "prompt": "", "completion": "", "reward": "high"}'),
    ],
)
def test_a_line_that_no_callback_wrote_is_named(
    file: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path)
    sample = {"timesteps": 0, "prompt": "Once", "completion": "", "reward": 1.5, "finish_reason": "stop"}
    write_json_lines(tmp_path / "samples.jsonl", [sample] * 5)
    with (tmp_path / file).open("a") as lines:
        lines.write(f"{line}\n")
    assert cli.main(["report", folder, "-o", str(tmp_path / "report.html")]) == 1
    writer = {"stability.jsonl": "StabilityCallback", "samples.jsonl": "SampleCallback"}[file]
    assert f"{tmp_path / file}: line 6 was not written by {writer}" in capsys.readouterr().err
