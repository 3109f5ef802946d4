"""What a rehearsal runs on: a base of two layers with random weights, and a few written traces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from r1distill.data import models
from r1distill.students.catalogue import Architecture, Student
from r1distill.students.subject import CONFIG, SETTINGS, unpacked

# Two layers whose rows llama.cpp's K-quants (blocks of 256), groups of 128 and vLLM's attention can take.
SHAPE = {"layers": 2, "hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2}
TIED_BASES = ("Qwen/Qwen2.5-Math-1.5B",)  # where the base's own config.json is not at hand
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
SHRUNK = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def write_traces(folder: Path, traces: int, questions: int) -> None:
    """traces.jsonl, sums with R1's kind of thinking, of which one is wrong and one was cut off; and questions.jsonl."""
    rows = [written(number) for number in range(traces + questions)]
    rows[1]["completion"] = rows[1]["completion"].replace(rows[1]["answer"], "1")
    rows[2] |= {"completion": rows[2]["completion"][:60], "finish_reason": "length"}
    for name, part in (("traces", rows[:traces]), ("questions", rows[traces:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def written(number: int) -> dict[str, str]:
    """A question with an R1-like completion, which has no opening tag, and its answer."""
    boxes, pens, gone = 3 + number, 4 + number * 7 % 11, 2 + number % 5
    total, answer = boxes * pens, boxes * pens - gone
    question = f"A shop has {boxes} boxes with {pens} pens each and sells {gone} of the pens. How many pens are left?"
    thinking = (
        f"Okay, so there are {boxes} boxes, and each of them has {pens} pens.\n\nThat makes {boxes} * {pens} = {total} "
        f"pens in all. Then {gone} of them are sold, so {total} - {gone} = {answer}.\n\nWait, let me check that again: "
        f"{answer} + {gone} = {total}. Yes, this is right."
    )
    response = f"The shop starts with ${boxes} \\times {pens} = {total}$ pens.\n\nLeft are \\boxed{{{answer}}} pens."
    return {
        "question": question,
        "prompt": f"{question}\n\n{INSTRUCTION}",
        "completion": f"{thinking}\n</think>\n\n{response}",
        "finish_reason": "stop",
        "answer": str(answer),
    }


def write_base(student: Student, shape: Architecture, source: Path, out: Path) -> int:
    """Random weights of a ``shape``, with the tokenizer and the settings in ``source``; returns their number."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with unpacked(source) as files:
        for file in files.iterdir():
            if file.suffix in (".json", ".jinja") and "safetensors" not in file.name:
                shutil.copyfile(file, out / file.name)
    wanted = shape.to_config().to_dict()
    known = (out / CONFIG).is_file()
    config = AutoConfig.from_pretrained(out) if known else shape.to_config()
    for key in SHRUNK:
        setattr(config, key, wanted[key])
    if getattr(config, "head_dim", None):
        config.head_dim = shape.hidden // shape.heads
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: shape.layers]
    if not known:
        config.tie_word_embeddings = models.title(student.base) in TIED_BASES
    if (licence := student.publication.base_license).startswith("llama"):  # it has to go along
        text = f"A rehearsal's stand-in for the LLAMA {licence.removeprefix('llama')} COMMUNITY LICENSE\n"
        (out / "LICENSE").write_text(text)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
    if not (out / SETTINGS).is_file():
        (out / SETTINGS).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(shape.to_config()).num_parameters())
