"""What a `Program` can be written as for other engines; its methods of that name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from loopq_compile.graph.state import get_state

if TYPE_CHECKING:
    from loopq_compile.backends.compressed_tensors import HuggingFaceExport
    from loopq_compile.backends.gguf import GgufExport
    from loopq_compile.backends.onnx import OnnxExport
    from loopq_compile.backends.openvino import OpenVinoExport


class Exports:
    """Methods that write `graph_module` in the formats of other engines."""

    graph_module: fx.GraphModule

    def export_onnx(
        self,
        directory: str | os.PathLike[str],
        *,
        target: str = "qdq",
        form: str = "unrolled",
        cache: bool = False,
        last_token: bool = False,
        products: str = "packed",
        head_bits: int | None = None,
        kv_bits: int | None = None,
        early_exit: bool = False,
        float_bits: int = 32,
        external_data_threshold: int | None = None,
    ) -> OnnxExport:
        """Writes `model.onnx` into `directory`.

        Args:
            directory: created if needed; an existing file stays until the new one is complete.
            target: "qdq", only standard operators; "onnxruntime", packed products of ONNX Runtime (`MatMulNBits`).
            form: "unrolled", each loop has its own nodes; "rolled", one `Loop` whose count is the input `loops`. Both
                store weights once.
            cache: prefill and decode in one file: inputs `attention_mask` `[batch, past + sequence]` (padding is on
                the left), `past_key_values.N.key` and `.value` `[batch, heads, past, size]`, outputs `present.N.key`
                and `.value`, for every loop and layer; in form "rolled" for every layer, with the loops as first
                dimension.
            last_token: with a cache, `logits` for only the last token, which saves the head's work on prompts.
            products: with target "onnxruntime": "packed" weights, the smallest file; "int8" products, which read
                prompts and batches several times as fast and take one byte per weight; "both", which uses the first for
                calls of up to three tokens and the second for others (unrolled). "int8" and "both" need quantized
                activations.
            head_bits: with target "onnxruntime", 4 or 8: bits of the head's weights, which schemes leave in floating
                point, and of embeddings that are tied to it.
            kv_bits: with a cache, 8 or 4: keys and values as integers, with scales as additional inputs and outputs.
            early_exit: form "rolled" may stop its loop early: one more input, `exit_threshold`, and one more output,
                `loops_spent`; see `with_early_exit`.
            float_bits: 16 stores scales, embeddings and all other floating-point tensors as float16.
            external_data_threshold: weights of more bytes than this get a separate file, `model.onnx.data`, from which
                ONNX Runtime opens a model faster and in less memory; 64 MiB by default. Weights above 2 GiB always do.

        Returns:
            Path, size and node counts of what was written.

        Raises:
            LoopQError: the target or form is unknown, the program cannot be rolled or cached, or the directory cannot
                be written.
        """
        from loopq_compile.backends.onnx import export
        from loopq_compile.storage.card import write_card

        options: dict[str, Any] = {"cache": cache, "last_token": last_token, "products": products}
        options |= {"head_bits": head_bits, "kv_bits": kv_bits, "early_exit": early_exit, "float_bits": float_bits}
        options["external_data_threshold"] = external_data_threshold
        report = export(self.graph_module, directory, target=target, form=form, **options)
        write_card(directory, get_state(self.graph_module), "onnx")
        return report

    def export_openvino(
        self,
        directory: str | os.PathLike[str],
        *,
        last_token: bool = False,
        head_bits: int | None = None,
        float_bits: int = 32,
    ) -> OpenVinoExport:
        """Writes `openvino_model.xml` and `.bin` into `directory`, with a key-value cache inside; integers go in
        unchanged.

        Inputs are those of `export_onnx(cache=True)` without the caches, and `beam_idx` `[batch]`, as optimum-intel and
        openvino-genai have it. 8-bit activations with scales from each token are left to OpenVINO, which rounds them
        itself, in groups of the scheme's size; other rounding, transforms and adapters run as the program has them.

        Args:
            directory: created if needed; an existing model stays until the new one is complete.
            last_token: `logits` for only the last token, which saves the head's work on prompts.
            head_bits: 8 or 4, for the head, which schemes leave in floating point, and embeddings that are tied to it.
            float_bits: 16 stores scales and all other floating-point tensors as float16.

        Returns:
            Path, size, and types of the weights.

        Raises:
            LoopQError: openvino is not installed, the program has a cache already or cannot have one, or the directory
                cannot be written.
        """
        from loopq_compile.backends.openvino import export

        return export(self.graph_module, directory, last_token=last_token, head_bits=head_bits, float_bits=float_bits)

    def export_gguf(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: str | os.PathLike[str] | None = None,
        config: Any = None,
        embeddings: str = "q8_0",
        head: str = "q8_0",
        pre_tokenizer: str | None = None,
    ) -> GgufExport:
        """Writes a GGUF file for llama.cpp; integers go in unchanged, and float16 scales (`method="loopq-plain"`), too.

        Weights of up to 4 bits become Q4_0, those of up to 8 bits Q8_0, gains and biases F32. Layers that run several
        times are stored once for each use, except where llama.cpp itself loops (`nanbeige`).

        Args:
            path: the file.
            tokenizer: folder with `tokenizer.json` and the model's `config.json` (or the `source_config.json` of a
                saved program); None writes no tokenizer, and llama.cpp then takes token ids only.
            config: the model's configuration, or its folder, if it is not beside the tokenizer.
            embeddings, head: "q8_0", "q6_k", "f16" or "f32", for what the scheme leaves in floating point. A head that
                is tied to the embeddings has their type.
            pre_tokenizer: llama.cpp's name for how text is split before byte-level BPE; None recognises it.

        Returns:
            Path, size, layers, types, and by how much scales were rounded.

        Raises:
            LoopQError: llama.cpp cannot run the program (transforms, adapters, tables per loop, static or clipped
                ranges, other groups, an unknown model), the configuration is missing, or the tokenizer is not known.
        """
        from loopq_compile.backends.gguf import export

        options: dict[str, Any] = {"tokenizer": tokenizer, "config": config, "embeddings": embeddings, "head": head}
        return export(self.graph_module, path, **options, pre_tokenizer=pre_tokenizer)

    def export_hugging_face(
        self,
        directory: str | os.PathLike[str],
        *,
        source: nn.Module | str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        dtype: str | None = None,
        zero_points: bool = False,
        trust_remote_code: bool = False,
    ) -> HuggingFaceExport:
        """Writes a folder that transformers and vLLM load, in the format of compressed-tensors; integers go in
        unchanged.

        Args:
            directory: created if needed; earlier files of such an export are replaced, all others stay.
            source: the model that was compiled, its folder, or its hub id: for its own code, tokenizer, and weights
                that the program does not use. None: where the model was loaded from, if that is on this machine.
            tokenizer: folder with `tokenizer.json` and generation settings to copy, such as a saved program.
            dtype: "float32", "float16" or "bfloat16" for scales and what is not quantized; None keeps the types.
            zero_points: whether weights with negative scales (`signed_scales`, the default below 8 bits) are written
                with zero points: the same numbers, in a form that vLLM reads and transformers only with
                `CompressedTensorsConfig(dequantize=True)`.
            trust_remote_code: whether code in the folder of `source` may run.

        Returns:
            Path, size, how many linears are quantized in which way, and by how much scales were rounded.

        Raises:
            LoopQError: the format cannot express the program (transforms, adapters, tables per loop, static or clipped
                ranges, activations of other than 8 bits), it is no model of transformers, or something is missing.
        """
        from loopq_compile.backends.compressed_tensors import export

        options: dict[str, Any] = {"source": source, "tokenizer": tokenizer, "dtype": dtype}
        options["zero_points"] = zero_points
        return export(self.graph_module, directory, **options, trust_remote_code=trust_remote_code)
