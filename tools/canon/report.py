# @title Reporting: summaries, figures, tables, the record of results
# canon: report
import io
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image, display
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from scipy import stats


def mean_std(values):
    """Mean and standard deviation of the sample (n - 1) along the first axis of values (seeds, ...); nan as deviation of a single one."""
    values = np.asarray(values, dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)


def summary(values, digits=3):
    """The values of the seeds as "mean ± standard deviation"; a single value alone, without a spread that nobody measured."""
    mean, std = mean_std(values)
    return f"{mean:,.{digits}f} ± {std:,.{digits}f}" if len(values) > 1 else f"{mean:,.{digits}f}"


def paired_interval(first, second, level=0.95):
    """(mean, low, high) of first - second, pair by pair (same seed, same test item): Student's interval of the mean difference."""
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if len(differences) < 2:
        return float(differences.mean()), -math.inf, math.inf
    half = stats.t.ppf((1 + level) / 2, len(differences) - 1) * stats.sem(differences)
    return float(differences.mean()), float(differences.mean() - half), float(differences.mean() + half)


def band(axes, x, curves, label, color, marker="o", marks=8):
    """Draw the mean of curves (seeds, points) with one standard deviation on either side, marked `marks` times along the line."""
    mean, std = mean_std(curves)
    every = max(1, len(mean) // marks)
    (line,) = axes.plot(x, mean, color=color, marker=marker, markersize=5, markevery=every, linestyle="-", label=label)
    if len(curves) > 1:
        axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    return line


def legend_beside(axes):
    """The legend to the right of the axes, so that it hides no data."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def write_cells(axes, image, texts):
    """Write texts (rows, columns) into the cells of `image`, as imshow() returned it: white on dark cells, black on light ones."""
    for (row, column), text in np.ndenumerate(np.asarray(texts, dtype=object)):
        red, green, blue = to_rgb(image.cmap(image.norm(image.get_array()[row, column])))
        dark = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.18  # relative luminance
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=10)


def show(figure, name, alt, task):
    """Display a figure as PNG at 150 dpi with `alt` for those who cannot see it, hand it to ClearML as `name`, and close it."""
    if preset_name(PRESET) == "smoke":
        figure.text(0.5, 0.5, "smoke: means nothing", ha="center", va="center", fontsize=24, color="gray", alpha=0.4, rotation=20)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    width = figure.get_figwidth()
    facts = {"alt": alt, "width": round(100 * width), "inches": width, "smallest_text": min(sizes, default=None)}
    display(Image(data=buffer.getvalue(), format="png", metadata=facts))
    task.get_logger().report_matplotlib_figure("figures", name, figure, report_interactive=False)  # as drawn, not converted to Plotly
    plt.close(figure)


def show_table(frame, name, task):
    """Display a pandas table and hand it to ClearML as `name`."""
    compact = re.sub(r"\n\s*", "", frame.to_html(border=0))  # pandas writes each cell on a line of its own
    display({"text/html": compact, "text/plain": frame.to_string()}, raw=True)
    task.get_logger().report_table("tables", name, table_plot=frame.reset_index())


class Results:
    """What a run has found, as data: one record per measured quantity, its values seed by seed."""

    def __init__(self):
        self.records = {}

    def add(self, name, values, unit="", better="higher", reference=""):
        """Keep the values of the seeds under `name`, in place of those of an earlier run of the cell.

        better: "higher" or "lower". reference: the figure of the paper or of another implementation, with its setting.
        """
        if better not in ("higher", "lower"):
            raise ValueError(f"better is {better!r}: it takes 'higher' or 'lower'")
        values = [float(value) for value in np.atleast_1d(values)]
        if not values:
            raise ValueError(f"{name} has no values")
        self.records[name] = {"name": name, "values": values, "unit": unit, "better": better, "reference": reference}

    def summary(self, name, digits=3):
        """Mean ± standard deviation of a record, for sentences."""
        return summary(self.records[name]["values"], digits)

    def table(self, digits=3):
        """The records as a pandas table, a row each."""
        rows = [
            {
                "quantity": record["name"], "mean ± std": summary(record["values"], digits), "unit": record["unit"],
                "runs": len(record["values"]), "better": record["better"], "reference": record["reference"],
            }
            for record in self.records.values()
        ]
        return pd.DataFrame(rows).set_index("quantity")

    def conclude(self, task, headline, gallery=None, digits=3):
        """Show the table, keep the records in results.json and the result in one sentence in run.json; say it, but not in smoke.

        headline: at most 25 words. gallery: at most 20 words with one or two numbers, for the list of notebooks; None: the headline.
        """
        show_table(self.table(digits), "results", task)
        finite = lambda value: value if math.isfinite(value) else None  # JSON knows no nan
        note("results.json", [{**record, "values": list(map(finite, record["values"]))} for record in self.records.values()])
        note("run.json", {**run_facts(), "headline": headline, "gallery": gallery or headline})
        smoke = preset_name(PRESET) == "smoke"
        print("No headline: the numbers of the smoke preset mean nothing." if smoke else headline)


def exercise(name, check):
    """Say whether an exercise is solved, that is, check() is true; one that is not never stops the run."""
    try:
        print(f"{name}: {'solved' if check() else 'not solved yet'}")
    except Exception as error:
        print(f"{name}: not solved yet ({type(error).__name__}: {error})")


results = Results()
