"""The model as transformers runs it, which is what an artifact must equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pilotlight_export.errors import SourceError
from pilotlight_export.quiet import quiet
from pilotlight_export.verify.graph_runner import Logits


class Reference:
    """The model as transformers runs it, in float32.

    Raises:
        SourceError: the weights are not all there; transformers would make up the rest.
    """

    def __init__(self, model_dir: Path) -> None:
        with quiet():
            import torch
            from transformers import AutoModelForCausalLM

            load: Any = AutoModelForCausalLM.from_pretrained
            self._model, loading = load(
                str(model_dir),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        if loading["missing_keys"]:
            raise SourceError(f"{model_dir}: the weights lack {sorted(loading['missing_keys'])[0]}")

    def logits(self, tokens: Sequence[int], positions: Sequence[int]) -> Logits:
        """Return the logits at some positions of one text.

        Shapes:
            output [N, V]
        """
        import torch

        with quiet(), torch.inference_mode():
            output = self._model(torch.tensor([list(tokens)]), logits_to_keep=torch.tensor(list(positions)))
        logits: Logits = output.logits[0].float().numpy()
        return logits
