"""Products: what merges give. One file each; the kind is in `mergecore/plugins/product.py`."""

from mergecore.products.adapter import Adapter as Adapter
from mergecore.products.dense import DenseModel as DenseModel
from mergecore.products.masks import Masks as Masks
