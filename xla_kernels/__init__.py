"""Kernels for asymmetric distance computation; imports jax and numpy only."""

from .adc.api import FactoredTables as FactoredTables
from .adc.api import adc_scores as adc_scores
from .adc.api import adc_top_k as adc_top_k
from .additive.api import assign_additive_codes as assign_additive_codes
from .encode.api import assign_codes as assign_codes
from .implementations import available_implementations as available_implementations
from .implementations import export_checks as export_checks
from .layout import PackedCodes as PackedCodes
from .layout import code_rows as code_rows
from .layout import pack_codes as pack_codes
from .layout import unpack_codes as unpack_codes
from .rescore.api import dot_top_k as dot_top_k
from .rescore.api import rescore_top_k as rescore_top_k
from .rescore.layout import PackedRows as PackedRows
from .rescore.layout import pack_rows as pack_rows
from .tree_search.api import Implementation as Implementation
from .tree_search.api import tree_search as tree_search
from .tree_search.direct import direct_tree_search as direct_tree_search
from .tree_search.packed import PackedTree as PackedTree
from .tree_search.packed import pack_tree as pack_tree
from .tree_search.packed import slots_per_block as slots_per_block
from .tree_search.xla import best_rows as best_rows
from .tree_search.xla import row_scores as row_scores
