"""SAEs on what a block's attention or MLP adds to the residual stream: --place attn_out, mlp_out.

    python experiments/forks/place.py --place mlp_out

They are SAELens's hooks blocks.L.hook_attn_out and hook_mlp_out, in Gemma after the norm that
follows. The stream after the block changes by x_hat - x.
"""

import sys
from pathlib import Path

sys.path.insert(0, str([*Path(__file__).parents][:3][-1]))
import saeft
from model_loaders import refuse


def added_by(part: str):
    """A place: what a part of a block adds. The block says which module's output that is."""

    def place(lm, tokens, layer: int):
        outputs, block = [], lm.blocks[layer]
        told = hasattr(block, part)
        refuse(not told, f"--place {part}: the blocks of that model do not tell theirs")
        module = block.get_submodule(getattr(block, part))
        hook = module.register_forward_hook(lambda module, args, out: outputs.append(out))
        resid = lm.prefix(tokens, layer)
        hook.remove()
        return resid, outputs[0]

    return place


saeft.PLACES["attn_out"] = added_by("attn_out")
saeft.PLACES["mlp_out"] = added_by("mlp_out")

if __name__ == "__main__":
    sys.exit(saeft.main())
