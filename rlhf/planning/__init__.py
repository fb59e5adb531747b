"""What a config needs: placement and memory by actor, from the model's config.json and safetensors headers alone."""

from rlhf.planning.checks import check_inputs as check_inputs
from rlhf.planning.checks import measure_examples as measure_examples
from rlhf.planning.checks import measure_offline as measure_offline
from rlhf.planning.learner import Row as Row
from rlhf.planning.learner import learner_memory as learner_memory
from rlhf.planning.plan import OFFLINE_STORE as OFFLINE_STORE
from rlhf.planning.plan import Plan as Plan
from rlhf.planning.plan import RolePlan as RolePlan
from rlhf.planning.plan import engine_memory as engine_memory
from rlhf.planning.plan import longest_row as longest_row
from rlhf.planning.plan import make_offline_plan as make_offline_plan
from rlhf.planning.plan import make_plan as make_plan
from rlhf.planning.show import show_plan as show_plan
from rlhf.planning.sizes import ModelSize as ModelSize
from rlhf.planning.sizes import model_size as model_size
from rlhf.planning.trained import Trained as Trained
from rlhf.planning.trained import lora_layers as lora_layers
from rlhf.planning.trained import trained as trained
from rlhf.planning.turns import TurnPlan as TurnPlan
