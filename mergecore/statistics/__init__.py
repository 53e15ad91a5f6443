"""Statistics: something about models that is worked out once and shared by many merges.

A file and a line here for each.
"""

# isort: skip_file
from mergecore.statistics.dropped_norms import DroppedNorms as DroppedNorms
from mergecore.statistics.profile import Profile as Profile
from mergecore.statistics.threshold import Threshold as Threshold
from mergecore.statistics.sign_majority import SignMajority as SignMajority
from mergecore.statistics.trimmed_norms import TrimmedNorms as TrimmedNorms
from mergecore.statistics.products import Products as Products
from mergecore.statistics.fisher import DiagonalFisher as DiagonalFisher
from mergecore.statistics.gram import Gram as Gram
from mergecore.statistics.coefficients import Coefficients as Coefficients
from mergecore.statistics.magnitude_quantiles import MagnitudeQuantiles as MagnitudeQuantiles
from mergecore.statistics.balance_cut import BalanceCut as BalanceCut
from mergecore.statistics.softmax_means import SoftmaxMeans as SoftmaxMeans
from mergecore.statistics.projected_sum import ProjectedSum as ProjectedSum
from mergecore.statistics.overlap_counts import OverlapCounts as OverlapCounts
from mergecore.statistics.unified_norms import UnifiedNorms as UnifiedNorms
