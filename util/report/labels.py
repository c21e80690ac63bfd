"""Names of runs, flags and figures as texts of charts and pages. A name may hold any character."""

import html

from util.files.names import printable

# Longer texts would take the place of the chart.
LONGEST = 120
LONGEST_TICK = 40


def chart_text(text: str, longest: int = LONGEST) -> str:
    r"""Return a text that matplotlib draws as it is, in one line and not too long.

    A pair of `$` would be a formula, and a label that starts with `_` would be left out of a legend.
    """
    text = printable(text)
    if len(text) > longest:
        # Names of runs often differ at their ends.
        half = longest // 2
        text = f"{text[:half]} ... {text[-half:]}"
    text = text.replace("$", r"\$")
    if text.startswith("_"):
        text = f" {text}"
    return text


def page_text(text: str) -> str:
    """Return a text for an HTML page: escaped, and without control characters."""
    return html.escape(printable(text))
