"""One HTML file that shows what happened in one or several runs; it needs nothing but a browser, not even a network."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from sb3_safe.controller import PHASES
from sb3_safe.stability import Row, stability_metrics

Runs = Mapping[str, Sequence[Row]]


class Panel(NamedTuple):
    """One plot: a column over timesteps, and what belongs beside it."""

    column: str
    title: str
    unit: str
    band: str | None = None
    """Column of a deviation, drawn as a band of one up and one down."""
    limit: str | None = None
    """Column of a moving limit, drawn dashed."""
    raw: str | None = None
    """Column of the unsmoothed values, drawn faintly."""


PANELS = (
    Panel("reward", "Reward of the episodes that ended, with its spread", "reward", band="reward_std"),
    Panel("gold", "Gold score, which the algorithm never sees", "gold score"),
    Panel("kl_short", "KL to the reference, and its moving threshold", "nats per action", limit="threshold", raw="kl"),
    Panel("entropy", "Entropy, and its floor", "nats per dimension", limit="entropy_floor"),
    Panel("update_kl", "KL of each update", "nats per action"),
    Panel("critic_gap", "Gap between the critics", "reward"),
    Panel("explained_variance", "Explained variance of the critic", "share"),
    Panel("length", "Length of the episodes that ended", "actions"),
    Panel("distinct_2", "Diversity of the texts (distinct bigrams)", "share"),
    Panel("stop_share", "Texts that ended by the end token", "share"),
)
SUMMARY = {
    "reward": "reward",
    "gold": "gold score",
    "kl": "KL to the reference, nats per action",
    "entropy": "entropy, nats per action dimension",
    "length": "length, actions",
    "distinct_2": "distinct bigrams, share",
    "stop_share": "ended by the end token, share",
    "explained_variance": "explained variance",
}
METRICS = {
    "crashes": "crashes: falls from the best level to under half its gain",
    "dispersion": "change of the mean reward between rollouts",
    "dispersion_net": "the same, net of sampling noise (rms)",
    "kl_spikes": "updates with a KL spike",
    "entropy_floor_hits": "rollouts under the entropy floor",
}
PHASE_COLORS = dict(zip(PHASES, ("#d9d9d9", "#cfe8cf", "#ffe3b8", "#cfe0f5"), strict=True))
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem; color: #222;
  background: #fff; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
figure { margin: 1.5rem 0 } figcaption { font-weight: 600 } img { width: 100%; height: auto }
.scroll { overflow-x: auto } table { border-collapse: collapse }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.text { white-space: pre-wrap; overflow-wrap: anywhere } .note { color: #666; font-size: .9rem }
"""


def write_report(
    runs: Runs,
    path: str | Path,
    samples: Sequence[Mapping[str, Any]] | None = None,
    title: str = "SAFE training report",
    evaluation: Mapping[str, tuple[float, float]] | None = None,
) -> Path:
    """Write the report: tables, plots, sampled texts. What the rows do not hold is left out.

    :param runs: by name, the rows that :class:`~sb3_safe.callbacks.StabilityCallback` collected; several are overlaid.
    :param path: of the HTML file; its folder is created.
    :param samples: texts, as :class:`~sb3_safe.text_callbacks.SampleCallback` collected them; the first and the last
        one of each prompt are shown.
    :param title: of the page.
    :param evaluation: by name, a value before and after training.
    :return: the path.
    :raises ImportError: matplotlib is not installed.
    :raises ValueError: no run has any row, or a row is not what the callback collects.
    """
    if not isinstance(runs, Mapping):
        raise ValueError(f"runs must be a dict of rows by the name of their run, got a {type(runs).__name__}")
    for name, run in runs.items():
        for number, row in enumerate(run, start=1):
            if not is_row(row):
                raise ValueError(
                    f"runs[{name!r}]: row {number} must be a dict of numbers with 'timesteps', got {row!r}"
                )
    if not any(runs.values()):
        raise ValueError(f"runs={list(runs)} have no rows: there is nothing to report")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)  # first, since drawing takes a while
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if evaluation:
        rows = [[name, _number(before), _number(after)] for name, (before, after) in evaluation.items()]
        parts.append(_section("Before and after training", _table(["", "before", "after"], rows)))
    parts += [_summary(runs), _stability(runs), _figures(runs), _texts(samples or [])]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")
    return path


def is_row(row: Any) -> bool:
    """Whether something is like a row of :class:`~sb3_safe.callbacks.StabilityCallback`: numbers, and their step."""
    numbers = isinstance(row, Mapping) and all(isinstance(value, Real) for value in row.values())
    return numbers and "timesteps" in row


# -- tables ------------------------------------------------------------------------------------------------------------


def _summary(runs: Runs) -> str:
    """Mean of each column over the first and the last tenth of each run."""
    rows = []
    for column, label in SUMMARY.items():
        ends = {name: _ends([row[column] for row in run if column in row]) for name, run in runs.items()}
        if any(ends.values()):
            rows.append(
                [label, *("" if end is None else f"{_number(end[0])} → {_number(end[1])}" for end in ends.values())]
            )
    steps = [f"{run[-1]['timesteps']:.0f}" if run else "" for run in runs.values()]
    seconds = [_number(run[-1]["seconds"]) if run and "seconds" in run[-1] else "" for run in runs.values()]
    rows += [["timesteps", *steps], ["seconds", *seconds]]
    note = '<p class="note">Mean over the first tenth of the rollouts → mean over the last tenth.</p>'
    return _section("In training", _table(["", *runs], rows) + note)


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    share = max(1, len(values) // 10)
    return (sum(values[:share]) / share, sum(values[-share:]) / share) if values else None


def _stability(runs: Runs) -> str:
    metrics = [stability_metrics(run) for run in runs.values()]
    rows = [
        [label, *(_number(of_run[name]) if name in of_run else "" for of_run in metrics)]
        for name, label in METRICS.items()
        if any(name in of_run for of_run in metrics)
    ]
    return _section("Stability", _table(["", *runs], rows)) if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a column of labels and columns of numbers; texts are escaped here."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><td>{html.escape(label)}</td>"
        + "".join(f'<td class="number">{html.escape(value)}</td>' for value in values)
        + "</tr>\n"
        for label, *values in rows
    )
    return f'<div class="scroll"><table><tr>{cells}</tr>\n{body}</table></div>'


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{content}\n"


def _number(value: float) -> str:
    """Four significant digits, at least all before the point; counts as they are."""
    if not math.isfinite(value):
        return "none"
    return f"{value:.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.4g}"


# -- texts -------------------------------------------------------------------------------------------------------------


def _texts(samples: Sequence[Mapping[str, Any]]) -> str:
    """The first and the last sample of every prompt."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_prompt.setdefault(str(sample["prompt"]), []).append(sample)
    rows = []
    for prompt, texts in by_prompt.items():
        rows.append(f'<tr><th colspan="3" class="text">{html.escape(prompt)}</th></tr>\n')
        rows += [_sample_row(text) for text in ([texts[0], texts[-1]] if len(texts) > 1 else texts)]
    head = "<tr><th>steps</th><th>reward</th><th>text</th></tr>\n"
    return _section("Texts", f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>') if rows else ""


def _sample_row(sample: Mapping[str, Any]) -> str:
    cut = "" if sample.get("finish_reason", "stop") == "stop" else " […]"
    return (
        f'<tr><td class="number">{sample["timesteps"]}</td><td class="number">{_number(sample["reward"])}</td>'
        f'<td class="text">{html.escape(str(sample["completion"]))}{cut}</td></tr>\n'
    )


# -- plots -------------------------------------------------------------------------------------------------------------


def _figures(runs: Runs) -> str:
    phased = next((name for name, run in runs.items() if any(map(_has_phase, run))), None)
    figures = [_figure(panel, runs, phased) for panel in PANELS if _has(panel.column, runs)]
    note = ""
    if phased is not None and len(runs) > 1:
        note = f'<p class="note">The shaded phases are those of {html.escape(phased)}.</p>'
    return _section("Over time", note + "".join(figures))


def _figure(panel: Panel, runs: Runs, phased: str | None) -> str:
    matplotlib = _import_matplotlib()
    # The object-oriented interface: no window system, no global list of figures.
    figure = matplotlib.figure.Figure(figsize=(7.2, 3.3), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, run) in enumerate(runs.items()):
        _draw(axes, panel, f" ({name})" if len(runs) > 1 else "", run, f"C{number}")
    if phased is not None:
        _shade_phases(axes, runs[phased])
    axes.set_xlabel("timesteps")
    axes.set_ylabel(panel.unit)
    axes.margins(x=0)
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        legend = figure.legend(loc="outside upper left", ncols=4, fontsize="small", frameon=False)
        for text in legend.get_texts():  # a name may have a $ in it, which would begin a formula
            text.set_parse_math(False)
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": panel.column}):  # the same run gives the same file
        figure.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    title = html.escape(panel.title)
    return (
        f'<figure id="{panel.column}"><figcaption>{title}</figcaption>'
        f'<img alt="{title}" src="data:image/svg+xml;base64,{data}"></figure>\n'
    )


def _draw(axes: Any, panel: Panel, suffix: str, run: Sequence[Row], color: str) -> None:
    """The curves of one run; columns that it does not have give empty ones, without a label."""

    def plot(column: str, **style: Any) -> None:
        steps, values = _series(run, column)
        label = column.replace("_", " ") + suffix if values else None
        axes.plot(steps, values, color=color, label=label, **style)

    plot(panel.column, linewidth=1.5)
    if panel.raw is not None:
        plot(panel.raw, linewidth=0.8, alpha=0.35)
    if panel.limit is not None:
        plot(panel.limit, linestyle="--")
    if panel.band is not None:
        rows = [row for row in run if panel.column in row and panel.band in row]
        low, high = ([row[panel.column] + sign * row[panel.band] for row in rows] for sign in (-1, 1))
        axes.fill_between([row["timesteps"] for row in rows], low, high, color=color, alpha=0.15, linewidth=0)


def _has_phase(row: Row) -> bool:
    """Whether a row has one of SAFE's phases; a controller of one's own may mean something else by the word."""
    return row.get("phase") in range(len(PHASES))


def _shade_phases(axes: Any, run: Sequence[Row]) -> None:
    """A band for every stretch of rollouts in one phase."""
    rows = list(filter(_has_phase, run))
    labelled: set[str] = set()
    start = 0.0
    for number, row in enumerate(rows):
        phase = PHASES[int(row["phase"])]
        if number + 1 < len(rows) and rows[number + 1]["phase"] == row["phase"]:
            continue
        label = None if phase in labelled else phase.lower()
        axes.axvspan(start, row["timesteps"], color=PHASE_COLORS[phase], alpha=0.5, linewidth=0, label=label, zorder=0)
        labelled.add(phase)
        start = row["timesteps"]


def _series(run: Sequence[Row], column: str) -> tuple[list[float], list[float]]:
    rows = [row for row in run if column in row]
    return [row["timesteps"] for row in rows], [row[column] for row in rows]


def _has(column: str, runs: Runs) -> bool:
    return any(column in row for run in runs.values() for row in run)


def _import_matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("the report needs matplotlib: pip install 'sb3-safe[report]'") from error
    return matplotlib
