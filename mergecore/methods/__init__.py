"""One file per method. `from mergecore import methods` gives the classes by their names."""

from mergecore.methods.average import Average
from mergecore.methods.breadcrumbs import Breadcrumbs
from mergecore.methods.consensus import Consensus
from mergecore.methods.della import Della
from mergecore.methods.fisher import Fisher
from mergecore.methods.iso_c import IsoC
from mergecore.methods.iso_cts import IsoCts
from mergecore.methods.karcher import Karcher
from mergecore.methods.lora_arithmetic import LoraArithmetic
from mergecore.methods.lora_lego import LoraLego
from mergecore.methods.model_stock import ModelStock
from mergecore.methods.opcm import Opcm
from mergecore.methods.pcb import Pcb
from mergecore.methods.sce import Sce
from mergecore.methods.slerp import Slerp
from mergecore.methods.task_arithmetic import TaskArithmetic
from mergecore.methods.ties import Ties
from mergecore.methods.tsv_m import TsvM
from mergecore.methods.wudi import Wudi
from mergecore.trims import RandomDrop

__all__ = [
    "Average",
    "Breadcrumbs",
    "Consensus",
    "Della",
    "Fisher",
    "IsoC",
    "IsoCts",
    "Karcher",
    "LoraArithmetic",
    "LoraLego",
    "ModelStock",
    "Opcm",
    "Pcb",
    "RandomDrop",
    "Sce",
    "Slerp",
    "TaskArithmetic",
    "Ties",
    "TsvM",
    "Wudi",
]
