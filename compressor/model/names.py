"""Map the parameters of a model to their names in its checkpoint, which relies on the renaming rules of transformers 5."""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from compressor.errors import SourceError
from compressor.model.checkpoint import Checkpoint
from compressor.model.packed_layers import PackedLayers


def checkpoint_names(model: PreTrainedModel, checkpoint: Checkpoint, packing: PackedLayers) -> dict[str, str]:
    """Module name -> checkpoint name, a packed layer under the name its dense weight would have.

    Raises:
        SourceError: the checkpoint stores a parameter in several pieces that loading would have to merge.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    names: dict[str, str] = {}
    for key in checkpoint:
        stored = packing.owner(key)
        renamed, converted = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            raise SourceError(
                f"{checkpoint.path}: {stored} is merged with others when loaded into {renamed}; "
                f"such checkpoints (`{model.config.model_type}`) are not supported yet"
            )
        if renamed in state:
            names[renamed] = stored
    return names
