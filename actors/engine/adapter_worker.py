"""Puts LoRA adapters from Ray's object store beside the base weights, inside vLLM's worker.

vLLM's own way in is a folder on the worker's disk, read when the first request names it. Its manager also takes tensors
that are already in memory, which needs no files, and lets a payload be checked before anything is touched. An update of
vLLM's weight-transfer API would not do: at its end the worker forgets all adapters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from actors.engine.receiver import Receiver


class AdapterWorker:
    """Mixed into vLLM's worker (`worker_extension_cls`); the engine calls its methods by `collective_rpc`."""

    model_runner: Any
    _adapter_receiver: Receiver

    def connect_adapters(
        self,
        address: str,
        namespace: str,
        holder: str,
        expected: Sequence[tuple[str, Sequence[int]]],
        deadline: float,
    ) -> dict[str, bool]:
        """Join the cluster as a receiver of the adapters `expected`, by name and shape, each within `deadline` s.

        Returns for each whether this worker has the layer that it belongs to.
        """
        from vllm.lora.utils import parse_fine_tuned_lora_name

        shapes = {name: tuple(shape) for name, shape in expected}
        self._adapter_receiver = Receiver(address, namespace, holder, shapes, deadline)
        manager, mapper = self._adapter_manager(), self._adapter_names()
        layers = set(manager.modules).union(*manager.packed_modules.values())
        return {name: parse_fine_tuned_lora_name(name, mapper)[0] in layers for name in shapes}

    def stage_adapter(self, tables: Sequence[Sequence[Mapping[str, Any]]], verify: bool) -> None:
        """Map and check a payload; raises `PayloadError`, and whatever is served stays as it is."""
        self._adapter_receiver.stage(tables, verify)

    def load_adapter(self, number: int, rank: int, alpha: int) -> None:
        """Make what is staged the adapter `number`, which requests can then name."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        manager = self._adapter_manager()
        options = PEFTHelper.from_dict({"r": rank, "lora_alpha": alpha, "target_modules": []})
        options.validate_legal(manager.lora_config)
        # Copies: vLLM multiplies B by its scale in place, and the mapped buffers are read-only.
        tensors = {name: tensor.clone() for name, tensor in self._adapter_receiver.tensors()}
        adapter = LoRAModel.from_lora_tensors(
            number,
            tensors,
            options,
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            weights_mapper=self._adapter_names(),
        )
        if not manager.add_adapter(adapter):
            raise RuntimeError(f"adapter {number} is there already")
        manager.activate_adapter(number)
        self._adapter_receiver.drop()

    def remove_adapter(self, number: int) -> None:
        """Forget an adapter that no request names any more."""
        self._adapter_manager().remove_adapter(number)

    def adapters(self) -> list[int]:
        """The adapters that are held."""
        return sorted(self._adapter_manager().list_adapters())

    def _adapter_manager(self) -> Any:
        return self.model_runner.lora_manager._adapter_manager

    def _adapter_names(self) -> Any:
        """How vLLM renames a checkpoint's modules; None where it does not."""
        mapper = getattr(self._adapter_manager().model, "hf_to_vllm_mapper", None)
        return None if mapper is None else mapper.get_rename_mapper()
