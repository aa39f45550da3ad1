"""How good a segmentation is: overlap, surface distances, tables of cases and organs, statistics (METHOD.md 4)."""

from organseg.metrics.evaluate import OUTCOMES, OrganScore, diagonal_mm, evaluate_case
from organseg.metrics.overlap import dsc, overlap_counts
from organseg.metrics.summary import OVERALL, CaseRow, OrganSummary, conventions, summarise, summary_text
from organseg.metrics.surface import surface_scores
from organseg.metrics.tables import read_case_table, write_case_table, write_summary
from organseg.metrics.torch_metrics import CaseDice

__all__ = [
    "OUTCOMES",
    "OVERALL",
    "CaseDice",
    "CaseRow",
    "OrganScore",
    "OrganSummary",
    "conventions",
    "diagonal_mm",
    "dsc",
    "evaluate_case",
    "overlap_counts",
    "read_case_table",
    "summarise",
    "summary_text",
    "surface_scores",
    "write_case_table",
    "write_summary",
]
