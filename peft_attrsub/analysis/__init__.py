"""What is in a basis: spectra and their patterns, overlap between attributes, outliers; in numbers and pictures."""

from .analyse import Analysis, analyse
from .explain import Captured, captured_energy
from .figures import save_figures
from .naming import Place, place
from .outliers import AdapterRecord, adapter_table
from .overlap import Null, eigenvalues, random_null
from .report import write_report
from .spectra import Drop, find_drops, pattern, suggest_dim

__all__ = [
    "AdapterRecord",
    "Analysis",
    "Captured",
    "Drop",
    "Null",
    "Place",
    "adapter_table",
    "analyse",
    "captured_energy",
    "eigenvalues",
    "find_drops",
    "pattern",
    "place",
    "random_null",
    "save_figures",
    "suggest_dim",
    "write_report",
]
