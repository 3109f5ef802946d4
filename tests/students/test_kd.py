"""A teacher's top-k: written and read beside real packs, and learned from through packing and masks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from r1distill.data import schema
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.students import checkpoints, kd, layout, logits, packing, preflight, schedule, sft, topk, trainer
from r1distill.students.catalogue import Student

TERMS = {"k": 8, "temperature": 2.0, "kl_weight": 0.7, "ce_weight": 0.3}
LORA = {"kind": "lora", "rank": 4, "alpha": 8}


def noisy(base: Path, folder: Path) -> Path:
    """A model of the same vocabulary with other weights, some of them large: its probabilities are far from even."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noisy(tiny_base, tmp_path_factory.mktemp("teacher"))


def taught(student: Student, teacher: Path) -> Student:
    distill = {"kind": "topk_kl", "teacher": {"kind": "folder", "path": str(teacher)}, **TERMS}
    return Student.model_validate({**student.model_dump(), "distill": distill})


def with_method(student: Student, method: dict) -> Student:
    return Student.model_validate({**student.model_dump(), "sft": {**student.sft.model_dump(), "method": method}})


@pytest.fixture
def student(tiny_student: Student, teacher: Path) -> Student:
    return taught(tiny_student, teacher)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where packs and logits are kept for all tests."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def packs(student: Student, sums_dataset: Path, made: Path) -> Path:
    folder = made / "packs"
    if not folder.is_dir():
        (folder / ".work").mkdir(parents=True)
        packing.build(student, sums_dataset, folder, made / "home")
    return folder


@pytest.fixture
def scored(student, packs: Path, made: Path, tmp_path: Path) -> Path:
    """A copy of the logits, by the worker's own code in this process, in shards of two packs."""
    if not (made / "logits").is_dir():
        logits.main(job(student, packs, made))
    shutil.copytree(made / "logits", tmp_path / "logits")
    return tmp_path / "logits" / "train"


def job(student: Student, packs: Path, folder: Path) -> dict:
    paths = {"packs": str(packs), "out": str(folder / "logits"), "home": str(folder / "home")}
    size = {"shard_tokens": 2 * student.packs.context_tokens, "gpus_each": 1}
    return {"student": student.model_dump(mode="json"), **size, **paths}


def table(packs: Path):
    return schema.read(packs / "train", schema.PACK)


def test_rows_are_the_teachers_for_each_member_read_alone(student, scored: Path, packs: Path, teacher: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    rows, read = topk.TopK(scored, table(packs)), list(schema.rows(table(packs)))
    assert len(rows.shards) > 1 and max(len(pack["members"]) for pack in read) > 1
    for number, pack in enumerate(read):
        ids, logprobs = rows.of(number)
        expected = []
        for member in range(len(pack["members"])):
            tokens, labels = packing.member(pack, member)
            with torch.no_grad():
                q = (model(torch.tensor([tokens])).logits[0].double() / TERMS["temperature"]).log_softmax(1)
            expected += [q[place - 1] for place, label in enumerate(labels) if label != -100]
        q = torch.stack(expected)
        assert ids.shape == (len(q), TERMS["k"])
        np.testing.assert_allclose(logprobs, q.topk(TERMS["k"]).values, atol=5e-3)
        np.testing.assert_allclose(q.gather(1, torch.from_numpy(ids).long()), logprobs, atol=5e-3)
    size = sum(file.stat().st_size for file in scored.glob("*.bin"))
    assert student.distill and size == student.distill.bytes_per_token * int(rows.counts.sum())


def test_what_is_there_is_not_made_again(scored: Path, student, packs, tmp_path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in scored.iterdir()}
    (scored / "00001.json").unlink()  # as if it had been killed before the last step
    with pytest.raises(R1DistillError, match="up to"):
        topk.TopK(scored, table(packs))
    logits.main(job(student, packs, tmp_path))
    topk.TopK(scored, table(packs))
    changed = {file.name for file in scored.iterdir() if before[file.name] != file.stat().st_mtime_ns}
    assert changed == {"00001.json", "00001.bin"}


def test_several_workers_share_the_shards(scored: Path, student, packs, tmp_path, monkeypatch) -> None:
    whole = {file.name: file.read_bytes() for file in scored.iterdir()}
    shutil.rmtree(scored)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        logits.main(job(student, packs, tmp_path))
    assert {file.name: file.read_bytes() for file in scored.iterdir()} == whole


def test_rows_of_other_packs_are_refused(scored: Path, packs: Path, tmp_path: Path) -> None:
    rows = list(schema.rows(table(packs)))
    rows[1]["labels"][-1], rows[1]["input_ids"][-1] = 5, 5
    schema.write(tmp_path / "changed", schema.PACK, rows)
    with pytest.raises(R1DistillError, match="made from other packs"):
        topk.TopK(scored, schema.read(tmp_path / "changed", schema.PACK))


def test_rows_that_are_shifted_by_one_are_caught(scored: Path, packs: Path) -> None:
    shard = topk.Shard(**json.loads((scored / "00000.json").read_text()))
    for whole in topk._map(scored / "00000.bin", shard, "r+")[::2]:  # ids and log-probabilities, not the labels' own
        whole[:] = np.roll(whole, 1, axis=0)
    with pytest.raises(R1DistillError, match="not the one of its label"):
        topk.TopK(scored, table(packs))


def test_a_cut_file_is_refused(scored: Path, packs: Path) -> None:
    with (scored / "00000.bin").open("r+b") as handle:
        handle.truncate(100)
    with pytest.raises(R1DistillError, match="100 bytes"):
        topk.TopK(scored, table(packs))


def test_another_vocabulary_is_refused(tiny_base: Path, tiny_r1_base: Path) -> None:
    from transformers import AutoTokenizer

    mine, other = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_base, tiny_r1_base))
    logits.check_vocabulary(mine, mine, "the same")
    with pytest.raises(RequestError, match="another vocabulary"):
        logits.check_vocabulary(mine, other, "the other")


def test_a_first_hop_of_another_vocabulary_is_refused_by_the_bases(tiny_student, tiny_r1_student, tmp_path) -> None:
    preflight.require_vocabulary(tiny_student, tiny_student, tmp_path)
    with pytest.raises(RequestError, match="another vocabulary"):
        preflight.require_vocabulary(tiny_student, tiny_r1_student, tmp_path)


def collated(packs: Path, rows: topk.TopK, every: int = 1, first: int = 0):
    """One batch of every ``every``-th pack, by the training's own collator."""
    read = schedule.Packs(table(packs), pad=0)
    chosen = [read[number] for number in range(first, len(read), every)]
    return kd.with_rows(trainer.collator(layout.Layout(), pad=0), rows)(chosen)


@pytest.fixture
def cases(student, packs: Path, scored: Path, tiny_r1_student, tiny_r1_base, sums_dataset, made: Path):
    """(student, packs, logits) of a case: all weights; an adapter; an adapter with whole rows of an untied head."""

    def case(name: str) -> tuple[Student, Path, Path]:
        if name != "rows":
            return with_method(student, LORA if name == "lora" else {"kind": "full"}), packs, scored
        folder, r1 = made / "r1", taught(tiny_r1_student, made / "r1" / "teacher")
        if not folder.is_dir():
            noisy(tiny_r1_base, folder / "teacher")
            (folder / "packs" / ".work").mkdir(parents=True)
            packing.build(r1, sums_dataset, folder / "packs", folder / "home")
            logits.main(job(r1, folder / "packs", folder))
        return r1, folder / "packs", folder / "logits" / "train"

    return case


def tuned(student: Student, packs: Path):
    """The model as it is trained, in float32; an adapter's weights are not those that it starts with."""
    import torch
    from peft import get_peft_model
    from transformers import AutoTokenizer

    from r1distill.students import base

    tokenizer = AutoTokenizer.from_pretrained(packs / "tokenizer")
    model = base.load(student.architecture, Path(student.base.path), tokenizer, torch.float32)  # type: ignore[union-attr]
    if student.sft.method.kind == "lora":
        torch.manual_seed(3)
        model = get_peft_model(model, trainer.lora(student, tokenizer))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) / 10)
    return model


def trained(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def gradients(student: Student, packs: Path, rows: topk.TopK, shift: int = 0):
    """(loss, named gradients) of one batch of all packs by the trainer's own loss."""
    model, batch = tuned(student, packs), collated(packs, rows)
    batch["topk_ids"], batch["topk_logprobs"] = (batch[name].roll(shift, 0) for name in ("topk_ids", "topk_logprobs"))
    assert student.distill
    vocab = student.architecture.vocab
    total = kd.token_losses(model, model.get_output_embeddings(), batch, student.distill, vocab).sum()
    assert "forward" not in vars(model.get_output_embeddings())
    total.backward()
    return total.item(), trained(model)


def dense(student: Student, packs: Path, rows: topk.TopK):
    """The same in float64, each member alone, with all of its logits, by the loss's definition."""
    import torch

    from r1distill.kernels.topk_kl.reference import Terms, token_losses

    model = tuned(student, packs).double()
    terms, total = Terms(TERMS["temperature"], TERMS["kl_weight"], TERMS["ce_weight"], "bucket"), 0.0
    for number, pack in enumerate(schema.rows(table(packs))):
        ids, logprobs = (torch.from_numpy(one) for one in rows.of(number))
        for member in range(len(pack["members"])):
            tokens, labels = (torch.tensor(one) for one in packing.member(pack, member))
            learned = labels[1:] != -100
            count = int(learned.sum())
            z = model(tokens[None]).logits[0, :-1][learned]
            loss = token_losses(z, labels[1:][learned], ids[:count].long(), logprobs[:count].double(), terms).sum()
            loss.backward()
            total += loss.item()
            ids, logprobs = ids[count:], logprobs[count:]
        assert not len(ids)
    return total, trained(model)


def worst(grads: dict, truths: dict) -> float:
    """The largest error of a gradient, as a share of that gradient's size."""
    assert grads.keys() == truths.keys()
    return max(float((grads[name].double() - true).abs().max() / true.abs().max()) for name, true in truths.items())


@pytest.mark.parametrize("case", ["full", "lora", pytest.param("rows", marks=pytest.mark.soak)])
def test_the_trained_loss_is_the_dense_one(cases, case: str) -> None:
    """Loss and every gradient to 1e-4 of their size, and a shift by one row is no such thing."""
    student, packs, folder = cases(case)
    rows = topk.TopK(folder, table(packs))
    loss, grads = gradients(student, packs, rows)
    true, truths = dense(student, packs, rows)
    assert loss == pytest.approx(true, rel=1e-4)
    assert worst(grads, truths) < 1e-4
    shifted, wrong = gradients(student, packs, rows, shift=1)
    assert abs(shifted / true - 1) > 1e-4  # little, since this student knows nothing yet
    assert worst(wrong, truths) > 0.1


SHARDED = """
import runpy, sys
from pathlib import Path
import torch
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from r1distill.students import kd
from r1distill.students.catalogue import Student

test, folder, packs = map(Path, sys.argv[1:])
init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
student = Student.model_validate_json((folder / "student.json").read_text())
model = runpy.run_path(test)["tuned"](student, packs)
inner = model.get_base_model() if hasattr(model, "get_base_model") else model
for layer in inner.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
batch = torch.load(folder / f"batch{get_rank()}.pt", weights_only=True)
kd.token_losses(model, model.get_output_embeddings(), batch, student.distill, student.architecture.vocab).sum().backward()
grads = {name: weight.grad.full_tensor() for name, weight in model.named_parameters() if weight.requires_grad}
if get_rank() == 0:
    torch.save(grads, folder / "grads.pt")
destroy_process_group()
"""


@pytest.mark.soak
@pytest.mark.parametrize("case", ["full", "lora", "rows"])
def test_a_sharded_head_gives_the_same_gradients(cases, case: str, tmp_path: Path) -> None:
    """Two processes, each with half of the packs and half of every weight (torch's fully_shard over gloo)."""
    import torch

    student, packs, folder = cases(case)
    rows = topk.TopK(folder, table(packs))
    for rank in range(2):
        torch.save(collated(packs, rows, every=2, first=rank), tmp_path / f"batch{rank}.pt")
    (tmp_path / "student.json").write_text(student.model_dump_json())
    (tmp_path / "sharded.py").write_text(SHARDED)
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, tmp_path / "sharded.py", __file__, tmp_path, packs], check=True, timeout=500)
    _, whole = gradients(student, packs, rows)
    theirs = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert worst({name: 2 * grad for name, grad in theirs.items()}, whole) < 1e-4  # theirs is the mean


def sharded_losses(student: Student, packs: Path, rows: Path, out: Path, spread: layout.Layout) -> dict[str, list]:
    """Loss and gradient norm of every step of the stage as it is run."""
    (out / ".work").mkdir(parents=True)
    sft.build(student, packs, out, out / "home", spread, logits=rows.parent)
    told = [row for row in json.loads((out / "loss.json").read_text()) if "loss" in row]
    return {name: [row[name] for row in told] for name in ("loss", "grad_norm")}


@pytest.mark.soak
@pytest.mark.parametrize("case", ["full", "lora"])  # whole rows under ZeRO-3: peft makes them on CUDA alone
def test_zero3_on_two_processes_learns_as_one_alone(cases, case: str, tmp_path: Path) -> None:
    """The head's weight is in pieces until it is asked for."""
    student, packs, rows = cases(case)
    alone = layout.Layout(checkpointing=False)
    two = layout.Layout(strategy="zero3", processes_per_node=2, checkpointing=False)
    one = sharded_losses(student, packs, rows, tmp_path / "one", alone)
    found = sharded_losses(student, packs, rows, tmp_path / "two", two)
    assert len(one["loss"]) > 2 and found["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.soak
@pytest.mark.parametrize("method", [{"kind": "full"}, LORA], ids=lambda one: one["kind"])
def test_a_student_learns_from_the_logits(student: Student, packs: Path, tmp_path: Path, method: dict) -> None:
    """The stage as it is run, then a training on it: the loss falls, checkpoints and validation are as ever."""
    student = with_method(student, method)
    for name in ("logits", "out"):
        (tmp_path / name / ".work").mkdir(parents=True)
    result = logits.build(student, packs, tmp_path / "logits", tmp_path / "home")
    result.check("logits")
    assert result.metrics["k"] == TERMS["k"] and result.kept == int(topk.targets(table(packs)).sum())
    spread = layout.build(student.sft.launch)
    done = sft.build(student, packs, tmp_path / "out", tmp_path / "home", spread, logits=tmp_path / "logits")
    assert done.metrics["last_loss"] < done.metrics["first_loss"] and done.metrics["validation_loss"] > 0
    assert checkpoints.last_good(tmp_path / "out" / ".work" / "checkpoints")


def kill_a_worker(killed: list[int], stop: threading.Event) -> None:
    """SIGKILL the first of Ray's workers that is seen at a shard."""
    while not (killed or stop.is_set()):
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"ray::score_shard" in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
                    killed.append(int(process.name))
                    return
        time.sleep(0.01)


@pytest.mark.soak
@pytest.mark.parametrize("way", ["accelerate", "ray"])
def test_shards_are_made_by_many(student, packs: Path, scored: Path, tmp_path: Path, monkeypatch, way: str) -> None:
    """Two processes of this machine, or two nodes of a cluster, one of whose workers is killed: the same bytes."""
    monkeypatch.setattr(topk, "SHARD_TOKENS", 2 * student.packs.context_tokens)
    out, home = tmp_path / "out", tmp_path / "home"
    if way == "accelerate":
        logits.build(student, packs, out, home, processes=2)
    else:
        pytest.importorskip("ray", reason="ray is not installed")
        from ray.cluster_utils import Cluster

        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        killed: list[int] = []
        stop = threading.Event()
        killer = threading.Thread(target=kill_a_worker, args=(killed, stop))
        killer.start()
        try:
            logits.build(student, packs, out, home, ray_address=nodes.address)
        finally:
            stop.set()
            killer.join()
            nodes.shutdown()
        assert killed
    made = {file.name: file.read_bytes() for file in (out / "train").iterdir()}
    assert made == {file.name: file.read_bytes() for file in scored.iterdir()}
