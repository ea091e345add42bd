"""The benchmark of recoverability: its choices, ranks and regrets, and jobs that are not done twice."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.recoverability import gradients, jobs, problem, recovery, report, summary, training
from engine.errors import RunError
from pruning.patterns import parse_pattern
from pruning.scores import measure_losses
from pruning.search import choice_masks
from pruning.surgery import keep_layers


def truth(kept, loss, calibration=1.0):
    return {"kind": "truth", "kept": list(kept), "seed": 0, "loss": loss, "calibration": calibration}


def chosen(method, kept, seed=0):
    return {"kind": "criterion", "pattern": "1:2", "method": method, "seed": seed, "chosen": list(kept)}


def test_choices():
    """All under a small pattern, a fixed sample under a large one."""
    assert jobs.choices_to_recover("1:2", 4, 300) == [[0, 2], [0, 3], [1, 2], [1, 3]]
    some = jobs.choices_to_recover("6:12", 12, 300)
    assert some == jobs.choices_to_recover("6:12", 12, 300)
    assert len({tuple(kept) for kept in some}) == 300
    assert all(len(set(kept)) == 6 for kept in some)


def test_regret_and_rank():
    rows = [truth((0, 2), 0.3), truth((0, 3), 0.1), truth((1, 2), 0.2), chosen("a", (1, 2)), chosen("a", (0, 3), 1)]
    rows += [chosen("b", (0, 2)), truth((1, 3), 0.05)]  # the last was neither drawn nor chosen
    first, second = summary.summarize(rows, {"1:2": [[0, 2], [0, 3], [1, 2]]})
    assert (first["method"], first["seeds"], first["rank"], first["of"]) == ("a", 2, 1.5, 3)
    assert (first["regret"], first["spread"]) == pytest.approx((0.05, 0.05))
    assert (second["method"], second["rank"]) == ("b", 3)
    assert second["regret"] == pytest.approx(0.2)


def test_choices_of_methods_that_were_not_drawn():
    """They may be the best, but ranks are among those that were drawn."""
    rows = [truth((0, 2), 0.3), truth((1, 3), 0.1), chosen("a", (0, 2)), chosen("b", (1, 3))]
    found = {row["method"]: row for row in summary.summarize(rows, {"1:2": [[0, 2]]})}
    assert (found["a"]["rank"], found["b"]["rank"], found["b"]["of"]) == (1, 1, 1)
    assert found["a"]["regret"] == pytest.approx(0.2)
    assert found["b"]["regret"] == 0


def test_rank_correlation():
    """Of the loss after the cut and the final one, by the ranks: here 1 - 6 * 6 / (4 * 15) = 0.4."""
    choices = jobs.choices_to_recover("1:2", 4, 300)
    rows = [truth(kept, *losses) for kept, losses in zip(choices, [(1, 2), (2, 40), (3, 1), (9, 50)], strict=True)]
    assert "final one: 0.40." in report.describe_truth("1:2", rows, choices)


def test_wins_are_counted_in_pairs():
    rows = [
        {
            "kind": "recovery",
            "kept": [0],
            "method": name,
            "seed": seed,
            "loss": loss,
            "distance": 0,
            "frechet": 0,
            "read": 0,
        }
        for name, losses in (("fine-tuning", (0.2, 0.3)), ("Masked KD", (0.1, 0.4)))
        for seed, loss in enumerate(losses)
    ]
    found = {row["recipe"]: row for row in summary.summarize_recoveries(rows)}
    assert (found["Masked KD"]["wins"], found["Masked KD"]["pairs"]) == (1, 2)


def test_losses_of_recipes_are_those_of_all_seeds():
    """Although samples are drawn of the first seed alone."""
    common = {"kind": "recovery", "kept": [0], "method": "Masked KD"}
    rows = [{**common, "seed": 0, "loss": 0.1, "distance": 1.0, "frechet": 5.0, "read": 0.5}]
    rows.append({**common, "seed": 1, "loss": 0.3, "distance": 2.0})
    (row,) = summary.summarize_recoveries(rows)
    assert (row["loss"], row["distance"], row["frechet"], row["read"]) == (0.2, 1.5, 5.0, 0.5)


def test_jobs_are_done_once(tmp_path):
    """What has a row is left out, and half a row counts as none."""
    path = tmp_path / "rows.jsonl"
    done, left = jobs.truth_job([0, 2], draw=True), jobs.truth_job([0, 3])
    path.write_text(json.dumps({**jobs.truth_job([0, 2]), "loss": 0.1}) + "\n" + '{"kind": "truth", "kept": [0, 3]')
    assert [row["kept"] for row in jobs.read_rows(path)] == [[0, 2]]
    assert jobs.unfinished([done, left], jobs.read_rows(path)) == [left]


def test_equal_jobs_are_done_as_first_asked_for():
    first, again = jobs.truth_job([0, 2], draw=True), jobs.truth_job([0, 2])
    assert jobs.unfinished([first, again], []) == [first]
    assert [job["draw"] for job in jobs.unfinished(jobs.list_truths(problem.PROBLEMS["mnist"]), []) if "draw" in job]


def test_rows_of_another_problem():
    """A teacher that was trained again may differ in the last bits, another one may not."""
    settings = {"steps": 150}
    rows = [{"kind": "teacher", "settings": settings, "loss": 0.1}]
    jobs.check_rows(rows, settings, 0.1000001, "rows.jsonl")
    for other, loss in ((settings, 0.1001), ({"steps": 20}, 0.1)):
        with pytest.raises(RunError, match=r"rows.jsonl: holds rows of another teacher"):
            jobs.check_rows(rows, other, loss, "rows.jsonl")


def test_rows_of_all_kinds_are_told(tiny):
    """Tables and the list of what is left to do from rows of every kind."""
    settings = replace(tiny[0], patterns=("1:2",), is_quick=False)
    drawn = jobs.choices_to_recover("1:2", 12, settings.sampled)
    ends = {"loss": 0.1, "distance": 0.01, "frechet": 2.0, "read": 0.9, "seconds": 1.0}
    rows = [{"kind": "teacher", "settings": {}, **ends}]
    rows += [{**truth(kept, 0.1 + k / 1000, 1 + k), "seconds": 1.0} for k, kept in enumerate(drawn)]
    rows += [{**chosen(jobs.BEST, drawn[1]), "kind": "learned", "seconds": 1.0}]
    found = jobs.list_recoveries(settings, rows, 2)
    assert {job["kind"] for job in found} == {"recovery", "depth", "quarter"}
    rows += [{**job, **ends, "curve": [[10, 0.2], [20, 0.1]], "time_share": 0.5} for job in found]
    assert jobs.unfinished(jobs.list_recoveries(settings, rows, 2), rows) == []
    page = report.describe(settings, rows)
    for words in (f"| 1:2 | {jobs.BEST} | 1 | 0.00100 |", "| Masked KD |", "| 1:6 |", "| in turns |", "0 of 2"):
        assert words in page
    assert f"| {jobs.BEST} | 100 | 100 |" in report.describe_all([(settings, rows)])


def test_quick_form_has_files_of_its_own(tmp_path):
    whole = problem.PROBLEMS["mnist"]
    assert problem.teacher_path(whole, tmp_path) != problem.teacher_path(problem.quick(whole), tmp_path)


@pytest.fixture
def tiny():
    settings = problem.quick(problem.Problem("digits"))
    pictures, _ = problem.load_pictures("digits")
    torch.manual_seed(0)
    state = problem.make_network(settings, pictures).state_dict()
    return settings, pictures, state


def test_equal_compute(tiny):
    """A distillation takes fewer steps than fine-tuning, by what the teacher's passes take."""
    seen = {}
    settings, pictures, state = tiny
    for name in ("fine-tuning", "output KD", "half of Masked KD"):
        recipe, looks = recovery.RECIPES[name], seen.setdefault(name, [])
        start = keep_layers(state, [0, 2, 4, 6, 8, 10])
        options = {"look": lambda net, spent, looks=looks: looks.append(spent)}
        recovery.recover(settings, pictures, start, state, recipe, 0, 20, **options)
    assert seen["fine-tuning"][-1] == 20
    assert seen["half of Masked KD"][-1] == pytest.approx(10, abs=1)
    assert seen["output KD"][-1] == pytest.approx(20, abs=1)
    assert len(seen["output KD"]) == 12  # of 12 steps, each of 5/3


def test_recovery_repeats(tiny):
    first, second = (training.fine_tune(*tiny, [0, 1, 2], 0).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("method", [*jobs.LEARNED, *jobs.ABLATIONS])
def test_learning_repeats(tiny, method):
    """The decision follows the pattern, and the same seed gives the same weights."""
    settings, pictures, state = tiny
    options = {**jobs.LEARNED, **jobs.ABLATIONS}[method]
    settings = replace(settings, learning_steps=3, batch_size=8)
    state = {key: value + 0.05 * torch.randn_like(value) for key, value in state.items()}  # at first all blocks idle
    ((kept, *_), learned), ((again, *_), same) = (
        training.learn_layers(settings, pictures, state, "1:2", 0, options) for _ in range(2)
    )
    assert kept == again
    assert [layer // 2 for layer in kept] == list(range(6))
    assert all(torch.equal(learned[key], same[key]) for key in state)
    moved = any(not torch.equal(learned[key], state[key]) for key in state)
    assert moved == (options.update != "none")


def test_exact_gradient(tiny):
    """That of the expected loss, by autograd over the probabilities of all 64 choices."""
    settings, pictures, state = tiny
    torch.manual_seed(0)
    state = {key: value + 0.1 * torch.randn_like(value) for key, value in state.items()}
    net = problem.make_network(settings, pictures, state, parse_pattern("1:2", 12)).eval()
    x, y = pictures.batch(slice(0, 8))
    objective = settings.make_objective()
    objective = gradients.FixedDraw(objective, objective.draw(net, x, y))
    found = gradients.exact_gradient(net, objective, x, y, 12)
    choices = jobs.choices_to_recover("1:2", 12, 64)
    losses = measure_losses(net, objective, [(x, y)], choice_masks(choices, 12)).tolist()
    logits = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
    likely = logits.log_softmax(1)
    expected = sum(
        loss * sum(likely[g, layer % 2] for g, layer in enumerate(kept)).exp()
        for loss, kept in zip(losses, choices, strict=True)
    )
    expected.backward()
    torch.testing.assert_close(found, logits.grad[:, 0])


def test_page_says_what_the_rows_say(root):
    """The tables of docs/results.md are those of the rows in the repository; ranks and regrets by a loop of our own."""
    problems = report.read_problems(root / "benchmarks/recoverability/results")
    assert len(problems) == 4
    page = (root / "docs/results.md").read_text().partition(report.START)[2]
    assert (
        page.strip()
        == "\n".join([report.describe_all(problems), *(report.describe(*each) for each in problems)]).strip()
    )
    seen = []
    for settings, rows in problems:
        losses = {tuple(row["kept"]): row["loss"] for row in rows if row["kind"] == "truth" and row["seed"] == 0}
        whole = report.whole_patterns(settings, rows)
        for row in report.summarize_patterns(rows, whole):
            asked = [r for r in rows if r.get("pattern") == row["pattern"] and "chosen" in r]
            taken = [losses[tuple(r["chosen"])] for r in asked if r["method"] == row["method"]]
            best = min(losses[tuple(kept)] for kept in (*whole[row["pattern"]], *(r["chosen"] for r in asked)))
            assert row["regret"] == pytest.approx(sum(taken) / len(taken) - best)
            drawn = [losses[tuple(kept)] for kept in whole[row["pattern"]]]
            ranks = [sum(loss < own for loss in drawn) + 1 for own in taken]
            assert row["rank"] == pytest.approx(sum(ranks) / len(ranks))
            seen.append(row["method"])
    assert {jobs.BEST, "sensitivity", "BK-SDM"} <= set(seen)
