"""On-policy distillation: its loss is the dense one, and what would spoil it is refused."""

from __future__ import annotations

import pytest

from r1distill.data.errors import R1DistillError, RequestError
from r1distill.students import onpolicy, preflight
from r1distill.students.template import TEMPLATES

from .own_answers import INSTRUCTION, answers, built, losses, on_policy, prompt

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("rows", "beta", "temperature"), [(320, 0.5, 0.7), (333, 1.0, 1.0), (264, 0.0, 1.0)])
def test_the_loss_of_on_policy_is_the_dense_one(
    rows, beta, temperature, student, prompts, checkpoint, teacher, tmp_path, here, monkeypatch
) -> None:
    """Loss and every gradient to 1e-4 of their size, over the rows that both vocabularies have."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    grads: dict[str, torch.Tensor] = {}
    plain = onpolicy.progress

    def progress(answers: int):
        class Grads(type(plain(answers))):  # type: ignore[misc]
            def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
                grads.update({name: weight.grad.clone() for name, weight in model.named_parameters()})

        assert issubclass(Grads, TrainerCallback)
        return Grads()

    monkeypatch.setattr(onpolicy, "progress", progress)
    folder = teacher(rows)
    settings = on_policy(folder, steps=1, beta=beta, temperature=temperature)
    built(student(settings, max_grad_norm=1e9), prompts, checkpoint, tmp_path / "out")

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    small, large = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.float64) for one in (checkpoint, folder))
    shared, total, tokens = min(320, rows), 0, 0
    for row in answers(tmp_path / "out"):
        question = prompt(int(row["prompt_id"][1:]))["question"]
        text = TEMPLATES["chatml"].prefix([{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}])
        asked, said = tokenizer.encode(text, add_special_tokens=False), row["token_ids"]
        places = slice(len(asked) - 1, len(asked) + len(said) - 1)
        s, t = (
            (model(torch.tensor([asked + said])).logits[0, places, :shared] / temperature).log_softmax(-1)
            for model in (small, large)
        )
        t = t.detach()
        m = torch.logsumexp(torch.stack([s + torch.tensor(1 - beta).log(), t + torch.tensor(beta).log()]), dim=0)
        if beta == 0:
            total = total + (t.exp() * (t - s)).sum()
        elif beta == 1:
            total = total + (s.exp() * (s - t)).sum()
        else:
            total = total + beta * (t.exp() * (t - m)).sum() + (1 - beta) * (s.exp() * (s - m)).sum()
        tokens += len(said)
    loss = total / tokens
    loss.backward()
    assert losses(tmp_path / "out") == [pytest.approx(loss.item(), rel=1e-4)]
    assert loss.item() > 1e-3 and grads.keys() == {name for name, _ in small.named_parameters()}
    for name, weight in small.named_parameters():
        found = grads[name].double()
        assert float((found - weight.grad).abs().max() / weight.grad.abs().max()) < 1e-4, name


def test_a_teacher_of_another_vocabulary_is_refused(student, prompts, checkpoint, tiny_r1_base, tmp_path, here) -> None:
    """By the stage, and by the look at everything before a teacher of traces is paid."""
    other = student(on_policy(tiny_r1_base))
    with pytest.raises(RequestError, match=r"beyond\.teacher .* has another vocabulary"):
        built(other, prompts, checkpoint, tmp_path)
    with pytest.raises(RequestError, match=r"beyond\.teacher .* has another vocabulary"):
        preflight.require_teachers(other, tmp_path)
    preflight.require_teachers(student(on_policy(checkpoint)), tmp_path)


def test_a_loss_that_is_no_number_stops_it(student, prompts, checkpoint, teacher, tmp_path, here) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = teacher(320)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(R1DistillError, match="step 1 has loss nan"):
        built(student(on_policy(folder)), prompts, checkpoint, tmp_path / "out")
    assert len(list((tmp_path / "out" / ".work" / "rollouts").glob("*.arrow"))) == 1
