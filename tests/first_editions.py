"""What tests know of notebooks of the first edition only: they print their results and write no file of them."""

import re

from tools import cookbook

MEASURE = re.compile(r"(?:validation (?:loss|accuracy)|AUROC|PRO|success) (?:[A-Za-z_ ]+ )?[\d.]+(?: ± [\d.]+)?")


def numbers(notebook):
    """The quantities in the headline, as text; speed and memory, which differ from run to run, are not among them."""
    return MEASURE.findall(cookbook.headline(notebook))
