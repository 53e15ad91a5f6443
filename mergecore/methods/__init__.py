"""The merge methods: a file and a line here for each. The registry, tests and pages take them from these lines, in this
order."""

# isort: skip_file
from mergecore.methods.average import Average as Average
from mergecore.methods.task_arithmetic import TaskArithmetic as TaskArithmetic
from mergecore.methods.ties import Ties as Ties
from mergecore.methods.fisher import Fisher as Fisher
from mergecore.methods.regmean import RegMean as RegMean
from mergecore.methods.adamerging import AdaMerging as AdaMerging
from mergecore.methods.slerp import Slerp as Slerp
from mergecore.methods.karcher import Karcher as Karcher
from mergecore.methods.model_stock import ModelStock as ModelStock
from mergecore.methods.sce import Sce as Sce
from mergecore.methods.iso_c import IsoC as IsoC
from mergecore.methods.iso_cts import IsoCts as IsoCts
from mergecore.methods.tsv_m import TsvM as TsvM
from mergecore.methods.star import Star as Star
from mergecore.methods.subspace_boosting import SubspaceBoosting as SubspaceBoosting
from mergecore.methods.cart import Cart as Cart
from mergecore.methods.wudi import Wudi as Wudi
from mergecore.methods.breadcrumbs import Breadcrumbs as Breadcrumbs
from mergecore.methods.della import Della as Della
from mergecore.methods.pcb import Pcb as Pcb
from mergecore.methods.magmax import Magmax as Magmax
from mergecore.methods.consensus import Consensus as Consensus
from mergecore.methods.opcm import Opcm as Opcm
from mergecore.methods.layer_swap import LayerSwap as LayerSwap
from mergecore.methods.lora_arithmetic import LoraArithmetic as LoraArithmetic
from mergecore.methods.lora_linear import LoraLinear as LoraLinear
from mergecore.methods.lora_ties import LoraTies as LoraTies
from mergecore.methods.lora_knots import LoraKnots as LoraKnots
from mergecore.methods.lora_core_space import LoraCoreSpace as LoraCoreSpace
from mergecore.methods.lora_lego import LoraLego as LoraLego
from mergecore.methods.nearswap import Nearswap as Nearswap
from mergecore.methods.ram import Ram as Ram
from mergecore.methods.arcee_fusion import ArceeFusion as ArceeFusion
from mergecore.methods.nuslerp import Nuslerp as Nuslerp
from mergecore.methods.multislerp import Multislerp as Multislerp
from mergecore.methods.tall_masks import TallMasks as TallMasks
from mergecore.methods.emr import Emr as Emr

# Parameters of methods that are written as mappings in YAML.
from mergecore.methods.ram import Boost as Boost
from mergecore.arithmetic.trims import RandomDrop as RandomDrop
from mergecore.arithmetic.series import Series as Series
