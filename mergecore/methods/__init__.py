"""One file per method. `from mergecore import methods` gives the classes by their names."""

from mergecore.arithmetic.trims import RandomDrop
from mergecore.methods.arcee_fusion import ArceeFusion
from mergecore.methods.average import Average
from mergecore.methods.breadcrumbs import Breadcrumbs
from mergecore.methods.consensus import Consensus
from mergecore.methods.della import Della
from mergecore.methods.emr import Emr
from mergecore.methods.fisher import Fisher
from mergecore.methods.iso_c import IsoC
from mergecore.methods.iso_cts import IsoCts
from mergecore.methods.karcher import Karcher
from mergecore.methods.layer_swap import LayerSwap
from mergecore.methods.lora_arithmetic import LoraArithmetic
from mergecore.methods.lora_lego import LoraLego
from mergecore.methods.model_stock import ModelStock
from mergecore.methods.multislerp import Multislerp
from mergecore.methods.nearswap import Nearswap
from mergecore.methods.nuslerp import Nuslerp
from mergecore.methods.opcm import Opcm
from mergecore.methods.pcb import Pcb
from mergecore.methods.ram import Boost, Ram
from mergecore.methods.sce import Sce
from mergecore.methods.slerp import Slerp
from mergecore.methods.tall_masks import TallMasks
from mergecore.methods.task_arithmetic import TaskArithmetic
from mergecore.methods.ties import Ties
from mergecore.methods.tsv_m import TsvM
from mergecore.methods.wudi import Wudi

__all__ = [
    "ArceeFusion",
    "Average",
    "Boost",
    "Breadcrumbs",
    "Consensus",
    "Della",
    "Emr",
    "Fisher",
    "IsoC",
    "IsoCts",
    "Karcher",
    "LayerSwap",
    "LoraArithmetic",
    "LoraLego",
    "ModelStock",
    "Multislerp",
    "Nearswap",
    "Nuslerp",
    "Opcm",
    "Pcb",
    "Ram",
    "RandomDrop",
    "Sce",
    "Slerp",
    "TallMasks",
    "TaskArithmetic",
    "Ties",
    "TsvM",
    "Wudi",
]
