"""Real optimiser steps do what the official ones do: outputs, matches, losses, gradients, weights, moving averages.

Float64 judges: two steps are compared with the official ones in float64 where a case brings them. A float32 recording
is then asked to be no farther from our run in float64 than our own float32 run is, times NOISE_FACTOR: no other case
lends its noise. Each case is trained once in either type.
"""

import os
import types

import numpy as np
import pytest
from reference import CASES, HEAVY, NOISE_FACTOR, RELATIVE_FLOOR, REPORT, find_cases, relative_error, stored_values
from reference_starts import (
    decisions,
    differing_start,
    inspect,
    recorded_matches,
    train_as_reference,
    train_from_reference_starts,
)
from reference_steps import Run, prepare, train, used_slots

from instseg_jax.training.optimizer import ema_decay

TRAIN_CASES = find_cases("*/train_*.json")
DOUBLE_CASES = [name for name in TRAIN_CASES if (CASES / f"{name}_f64.npz").exists()]
OFFICIAL = {"class": "class", "box_l1": "bbox", "box_giou": "giou", "mask_bce": "mask", "mask_dice": "dice"}
OUTPUT_NAMES = {"class_logits": "logits", "boxes": "boxes", "mask_queries": "masks"}
FIRST_STEP, DOUBLE = 1e-9, 1e-6  # relative errors in float64: loss terms of the first step, and all else
WEIGHTS_IN_FLOAT64 = 1e-3  # learning rates
ZERO_GRADIENT = 1e-12  # of the global norm: biases before a batch norm have no gradient but rounding
OFF = 0.1  # learning rates; float32 weights farther than this had a gradient of mere rounding
FALL = 0.95  # a total that the reference brings below this share of the last step's falls in ours as well
RATE_ROUNDING = 2e-11  # float32 near the full learning rate of 1e-4
# In float32 as well: our float64 run above is checked first, and is what these are held against.
parametrized = pytest.mark.parametrize("name", [pytest.param(name, marks=HEAVY) for name in TRAIN_CASES])
parametrized_in_float64 = pytest.mark.parametrize("name", [pytest.param(name, marks=HEAVY) for name in DOUBLE_CASES])


def test_there_is_a_case():
    assert TRAIN_CASES or "INSTSEG_PARITY" in os.environ


def term_names() -> dict[str, str]:
    """The reference's name of each of our sums, and of the total."""
    suffixes = ("", "_aux", "_dn", "_aux_dn")
    names = {term + suffix: f"loss_{official}{suffix}" for term, official in OFFICIAL.items() for suffix in suffixes}
    return names | {"total": "loss"}


@parametrized_in_float64
def test_loss_terms_in_float64(name):
    theirs, run = prepare(name).case.tensors_f64, train(name, "float64")
    listed, compared = list(theirs["term_names"]), 0
    for step in (0, 1):
        if f"terms{step}" not in theirs:
            continue
        values = dict(zip(listed, theirs[f"terms{step}"], strict=True))
        values.setdefault("loss", sum(values.values()))
        errors = {ours: relative_error(run.terms[step][ours], values[key]) for ours, key in term_names().items()}
        worst = max(errors, key=errors.get)
        figures = f"{errors['total']:.1e} in the total, {errors[worst]:.1e} in a term ({worst})"
        REPORT.append((name, f"float64, step {step + 1}", figures))
        assert errors[worst] <= (FIRST_STEP if step == 0 else DOUBLE), errors
        compared += 1
    assert compared


@parametrized_in_float64
def test_gradients_and_weights_in_float64(name):
    case, run = prepare(name).case, train(name, "float64")
    floor = ZERO_GRADIENT * run.grad_norm
    errors, norms, weights, statistics = {}, {}, {}, {}
    for key, theirs in case.tensors_f64.items():
        kind, _, tensor = key.removesuffix("@s").partition("@")
        if kind == "G":
            pair = stored_values({key: theirs}, key, run.gradients[tensor], f"G@{tensor}")
            errors[tensor] = relative_error(pair[1], pair[0], floor / DOUBLE)
        elif kind == "N":
            norms[tensor] = relative_error(np.linalg.norm(run.gradients[tensor]), theirs, floor / DOUBLE)
        elif kind == "P1":
            reference, mine = stored_values({key: theirs}, key, run.weights[1][tensor], f"P@{tensor}")
            if tensor.endswith(("_mean", "_variance")):
                statistics[tensor] = relative_error(mine, reference)
            else:
                weights[tensor] = np.abs(mine - reference).max() / run.learning_rates[0]
    for what, found in (("gradient samples", errors), ("gradient norms", norms), ("statistics", statistics)):
        if found:
            worst = max(found, key=found.get)
            REPORT.append((name, f"float64, {what}", f"{found[worst]:.1e} at most ({worst})"))
            assert found[worst] <= DOUBLE, (what, worst, found[worst])
    worst = max(weights, key=weights.get)
    REPORT.append((name, "float64, weights after step 1", f"{weights[worst]:.1e} learning rates at most ({worst})"))
    assert weights[worst] <= WEIGHTS_IN_FLOAT64, worst
    assert len(errors) == len([key for key in case.tensors_f64 if key.startswith("G@")]) > 0


@parametrized
def test_queries_and_start_boxes(name):
    """`decisions` asserts that those of the reference are float64's, or rounding's."""
    tokens, starts = decisions(name)
    own = inspect(name, "float64")
    swapped = int((own["tokens"][:, : tokens.shape[1]] != tokens).sum())
    given = {dtype: bool(differing_start(name, dtype)) for dtype in ("float32", "float64")}
    REPORT.append((name, "queries in another place", f"{swapped}; other queries or boxes given: {given}"))
    assert np.isfinite(starts).all() and len(np.unique(tokens[0])) == tokens.shape[1]


def first_outputs(setup: types.SimpleNamespace, run: Run, maps: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Our tensors of the first step under the names of the reference."""
    outputs, used, mine = run.outputs, used_slots(setup), {}
    for kind in ("class_logits", "boxes", "mask_queries"):
        matching, denoising = getattr(outputs.matching, kind), getattr(outputs.denoising, kind)[:, :, :used]
        rows = {"enc": matching[0], "init": np.concatenate([denoising[0], matching[1]], axis=1)}
        rows["dec"] = np.concatenate([denoising[1:], matching[2:]], axis=2)
        for stage, value in rows.items():
            if kind == "mask_queries":
                value = np.einsum("...bqp,bhwp->...bqhw", value, outputs.mask_features, optimize=True)
            mine[f"{stage}_{OUTPUT_NAMES[kind]}"] = value
    mine["mask_feat"] = np.moveaxis(outputs.mask_features, -1, 1)
    mine |= {f"neck{i}": np.moveaxis(x, -1, 1) for i, x in enumerate(maps)}
    return mine | {f"{stage}_boxes_full": mine[f"{stage}_boxes"] for stage in ("enc", "init")}


@parametrized
def test_first_outputs(name):
    setup, tensors = prepare(name), prepare(name).case.tensors
    single, double = (
        first_outputs(setup, train_as_reference(name, dtype), inspect(name, dtype)["maps"])
        for dtype in ("float32", "float64")
    )
    ratios, in_order = {}, any(key in tensors for key in ("enc_boxes_full", "enc_boxes_full@s"))
    for stage, value in double.items():
        pair = stored_values(tensors, stage, value)
        if pair is None or (stage.startswith(("enc_", "init_", "dec_")) and not in_order):
            continue  # rows of queries can be compared where the case tells whose they are
        reference, exact = pair
        own = relative_error(stored_values(tensors, stage, single[stage])[1], exact)
        ratios[stage] = relative_error(reference, exact) / max(NOISE_FACTOR * own, RELATIVE_FLOOR)
    if not ratios:
        pytest.skip("the case stores no outputs that can be compared")
    worst = max(ratios, key=ratios.get)
    REPORT.append((name, "training outputs, worst stage", f"{ratios[worst]:.2f} of the tolerance ({worst})"))
    assert ratios[worst] <= 1, ratios


@parametrized
def test_matches(name):
    """Those of the reference, or others that cost the same within the noise of our two runs."""
    single, double = (train_from_reference_starts(name, dtype) for dtype in ("float32", "float64"))
    expected, recorded = recorded_matches(name, double.query_index)
    noise = NOISE_FACTOR * np.abs(single.match_costs - double.match_costs).max()
    others = 0
    for ours, theirs, cost in zip(double.query_index, expected, double.match_costs, strict=True):
        for mine, their, own_cost in zip(ours, theirs, cost, strict=True):
            slots = np.flatnonzero(mine >= 0)
            assert (their[slots] >= 0).all()
            excess = own_cost[their[slots], slots].sum() - own_cost[mine[slots], slots].sum()
            assert excess <= noise * len(slots), f"{their[slots]} for {mine[slots]} costs {excess} more"
            others += int((their != mine).sum())
    REPORT.append((name, "matches, first step", f"{recorded} recorded, {others} another query of equal cost"))
    assert recorded or not any("match" in key for key in prepare(name).case.tensors)


@parametrized
def test_loss_terms(name):
    """Two steps against float64; later ones, where two runs in float64 part as well, are finite and fall."""
    setup = prepare(name)
    single, double = (train_as_reference(name, dtype) for dtype in ("float32", "float64"))
    for step, exact in enumerate(double.terms):
        theirs, own = {}, {}
        for ours, official in term_names().items():
            theirs[ours] = relative_error(setup.history[step][official], exact[ours])
            own[ours] = relative_error(single.terms[step][ours], exact[ours])
        worst = max(theirs, key=theirs.get)
        ratio = theirs[worst] / max(NOISE_FACTOR * max(own.values()), RELATIVE_FLOOR)
        figures = f"{ratio:.2f} of the tolerance ({worst}; {theirs[worst]:.1e}, ours {max(own.values()):.1e})"
        REPORT.append((name, f"loss terms, step {step + 1}", figures))
        assert ratio <= 1, (step, theirs, own)
    totals = [terms["total"] for terms in single.terms]
    assert len(totals) == len(setup.history)
    assert np.isfinite([list(terms.values()) for terms in single.terms]).all()
    for i in range(2, len(totals)):
        if setup.history[i]["loss"] < FALL * setup.history[i - 1]["loss"]:
            assert totals[i] < totals[i - 1], f"the total rises to {totals[i]} in step {i + 1}"


@parametrized
def test_gradients(name):
    setup = prepare(name)
    single, double = (train_as_reference(name, dtype) for dtype in ("float32", "float64"))
    expected, total = setup.case.info["grad_norms"], setup.case.info["grad_global_norm"]
    exact = {key: np.linalg.norm(gradient) for key, gradient in double.gradients.items()}
    assert {key for key, norm in exact.items() if norm > 0} <= set(expected)
    # What is computed for a bias before a batch norm is rounding, here and there.
    rounding = np.finfo(np.float32).eps * total
    norms, samples = {"theirs": {}, "ours": {}}, {"theirs": {}, "ours": {}}
    for key, norm in expected.items():
        mine = np.linalg.norm(single.gradients[key].astype(np.float64))
        norms["theirs"][key] = abs(norm - exact[key]) / max(exact[key], rounding)
        norms["ours"][key] = abs(mine - exact[key]) / max(exact[key], rounding)
        drawn_as = f"G@{key}"
        pair = stored_values(setup.case.tensors, drawn_as, double.gradients[key], drawn_as)
        if pair is not None:
            reference, values = pair
            mine = stored_values(setup.case.tensors, drawn_as, single.gradients[key], drawn_as)[1]
            samples["theirs"][key] = relative_error(reference, values, rounding)
            samples["ours"][key] = relative_error(mine, values, rounding)
    for what, found in (("norms", norms), ("samples", samples)):
        for kind, figure in (("worst", np.max), ("median", np.median)):
            if not found["theirs"]:
                continue
            theirs, ours = (float(figure(list(found[whose].values()))) for whose in ("theirs", "ours"))
            limit = max(NOISE_FACTOR * ours, RELATIVE_FLOOR)
            text = f"{theirs / limit:.2f} of the tolerance ({theirs:.1e}, ours {ours:.1e})"
            REPORT.append((name, f"gradient {what}, {kind}", text))
            assert theirs <= limit, (what, kind, max(found["theirs"], key=found["theirs"].get))
    error, own = abs(total - double.grad_norm) / double.grad_norm, abs(single.grad_norm / double.grad_norm - 1)
    own = max(own, max(norms["ours"].values()) / NOISE_FACTOR)  # it may agree by luck
    REPORT.append((name, "global gradient norm", f"{error:.1e} from float64, ours {own:.1e}"))
    assert error <= max(NOISE_FACTOR * own, RELATIVE_FLOOR)


@parametrized
def test_weights_statistics_and_moving_averages(name):
    """Adam turns rounding in a small gradient into a step of the size of the learning rate: such values are counted."""
    setup = prepare(name)
    single, double = (train_as_reference(name, dtype) for dtype in ("float32", "float64"))
    for k in single.weights:
        for letter, kind in (("P", "weights"), ("E", "averages")):
            stored = {key for key in setup.case.tensors if key.startswith(f"{letter}{k}@")}
            if not stored:
                continue
            ours = getattr(single, kind)[k]
            if k in getattr(double, kind):
                check_against_float64(name, stored, ours, getattr(double, kind)[k], k, kind)
                continue
            reach = 2.2 * sum(row["lr"] for row in setup.history[:k])  # two ways of Adam, 1.1 rates a step at most
            for key in stored:
                tensor = key.removesuffix("@s").partition("@")[2]
                reference, mine = stored_values(setup.case.tensors, key, ours[tensor], f"P@{tensor}")
                assert np.isfinite(mine).all(), tensor
                if not tensor.endswith(("_mean", "_variance")):
                    assert np.abs(mine - reference).max() <= reach, tensor
    assert single.weights


def check_against_float64(name: str, stored: set[str], single: dict, double: dict, k: int, kind: str) -> None:
    setup = prepare(name)
    rate = np.mean([row["lr"] for row in setup.history[:k]])
    off, counted, statistics = {"theirs": 0, "ours": 0}, 0, {"theirs": [], "ours": []}
    for key in stored:
        tensor = key.removesuffix("@s").partition("@")[2]
        reference, exact = stored_values(setup.case.tensors, key, double[tensor], f"P@{tensor}")
        mine = stored_values(setup.case.tensors, key, single[tensor], f"P@{tensor}")[1]
        for whose, values in (("theirs", reference), ("ours", mine)):
            if tensor.endswith(("_mean", "_variance")):
                statistics[whose].append(relative_error(values, exact))
            else:
                error = np.abs(values - exact) - 2 * k * np.spacing(np.abs(reference))
                off[whose] += int((error > OFF * rate).sum())
        counted += 0 if tensor.endswith(("_mean", "_variance")) else len(exact)
    share = share_off(single, double, rate, k)
    limit = NOISE_FACTOR * max(off["ours"], share * counted, 1)
    text = f"{off['theirs']} of {counted} off, ours {off['ours']}, of all our values {100 * share:.2f} %"
    REPORT.append((name, f"{kind}, step {k}", text))
    assert off["theirs"] <= limit
    theirs, ours = max(statistics["theirs"]), max(statistics["ours"])
    REPORT.append((name, f"batch statistics, {kind}, step {k}", f"{theirs:.1e} from float64, ours {ours:.1e}"))
    assert theirs <= max(NOISE_FACTOR * ours, RELATIVE_FLOOR)


def share_off(single: dict, double: dict, rate: float, k: int) -> float:
    """Share of all weights in which our two runs differ by more than OFF learning rates."""
    count = total = 0
    for tensor, exact in double.items():
        if not tensor.endswith(("_mean", "_variance")):
            error = np.abs(single[tensor] - exact) - 2 * k * np.spacing(np.abs(single[tensor]))
            count, total = count + int((error > OFF * rate).sum()), total + exact.size
    return count / total


@parametrized
def test_learning_rates_and_decay_of_the_averages(name):
    setup, run = prepare(name), train_as_reference(name, "float32")
    info, optimizer = setup.case.info, setup.config.optimizer
    np.testing.assert_allclose(run.learning_rates, [row["lr"] for row in setup.history], rtol=1e-6, atol=RATE_ROUNDING)
    for step, rate in listed_rates(info.get("lr_schedule", setup.case.tensors.get("lr_schedule", []))):
        np.testing.assert_allclose(setup.schedule(step), rate, rtol=1e-6, atol=RATE_ROUNDING)
    for key, value in info.items():
        if key.startswith("ema_decay_step"):
            count = int(key.removeprefix("ema_decay_step")) - 1
            decay = ema_decay(count, decay=optimizer.ema_decay, ramp_steps=optimizer.ema_ramp_steps)
            np.testing.assert_allclose(decay, value, rtol=1e-6)


def listed_rates(schedule) -> list[tuple[int, float]]:
    """(step, rate) of a table {step: rate}, of a list of rates, or of a list of such pairs."""
    if isinstance(schedule, dict):
        return [(int(step), float(rate)) for step, rate in schedule.items()]
    return [(int(row[0]), float(row[1])) if np.ndim(row) else (i, float(row)) for i, row in enumerate(schedule)]
