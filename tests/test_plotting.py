"""The data behind the figures: what is drawn is the exact posterior, the approximation, and the stated numbers."""

import json

import matplotlib as mpl
import numpy as np
import pytest
import torch

from dlgm_tutorial import cast
from dlgm_tutorial.checks import check_close
from dlgm_tutorial.distributions import DiagonalNormal
from dlgm_tutorial.evaluation import Calibration, Gaps
from dlgm_tutorial.plotting import (
    COLORS,
    NUMBERS,
    calibration_panel,
    portrait,
    portrait_numbers,
    use_style,
    write_portrait,
)

mpl.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    mpl.pyplot.close("all")


def normal_of(member):
    return DiagonalNormal(member.mean, member.covariance.diagonal(dim1=-2, dim2=-1).log())


@pytest.mark.parametrize("name", ["line", "wave", "digits2"])
def test_portrait_shades_a_density_that_integrates_to_one(name):
    member = cast.load(name)
    _, data = portrait(member, normal_of(member))
    for i in range(4):
        steps = np.diff(data["axes"][i], axis=0)[0]
        assert abs(data["exact"][i].sum() * np.prod(steps) - 1) < 0.02
        z = torch.from_numpy(data["axes"][i][[7, 50]])
        want = (member.log_joint(member.x[[i]], z[:, None])[:, 0] - member.log_evidence[i]).exp()
        num_points = len(data["axes"][i])
        at = [7, 50] if name != "digits2" else [7 * num_points + 7, 50 * num_points + 50]
        check_close(data["exact"][i][at], want, 1e-9)


def test_line_and_its_normal_coincide():
    line = cast.line()
    _, data = portrait(line, normal_of(line))
    check_close(np.stack(data["approximation"]), np.stack(data["exact"]), 1e-10)


@pytest.mark.parametrize("name", ["wave", "digits2"])
def test_the_axes_depend_on_the_member_only(name):
    member = cast.load(name)
    _, alone = portrait(member)
    _, other = portrait(member, torch.randn(200, 4, member.num_latents), label="samples")
    check_close(np.stack(alone["axes"]), np.stack(other["axes"]), 1e-15)
    assert alone["approximation"] == [None] * 4 and other["approximation"][2].shape == (200, member.num_latents)


def test_panels_show_points_colours_and_numbers():
    use_style()
    wave = cast.wave()
    gaps = Gaps(bound=wave.log_evidence - 0.5, approximation=torch.full((4,), 0.5), amortization=torch.tensor([-0.001] * 4))
    figure, data = portrait(wave, normal_of(wave), gaps=gaps, title="a title")
    assert [panel.get_title() for panel in figure.axes] == list(cast.POINTS)
    text = figure.axes[2].get_xlabel()
    for name in NUMBERS.values():
        assert name in text
    assert "approx. gap  0.50" in text and "amort. gap  0.00" in text
    assert figure.axes[0].lines[0].get_color() == COLORS["approximation"]
    assert data["numbers"]["torn"]["bound"] == float(wave.log_evidence[2] - 0.5)


def test_numbers_that_do_not_exist_are_dashes():
    figure, data = portrait(cast.wave())
    assert data["numbers"]["easy"]["bound"] is None and "bound  —" in figure.axes[0].get_xlabel()


def test_numbers_are_written_for_chapter_seven(tmp_path):
    wave = cast.wave()
    numbers = portrait_numbers(wave, Gaps(bound=wave.log_evidence - 0.25, approximation=torch.full((4,), 0.25)))
    path = write_portrait("02", {"wave": numbers}, folder=tmp_path / "portrait")
    read = json.loads(path.read_text())
    assert path.name == "02.json" and set(read["wave"]) == set(cast.POINTS) and set(read["wave"]["bent"]) == set(NUMBERS)
    row = read["wave"]["bent"]
    check_close(row["log_evidence"] - row["bound"], 0.25, 2e-4)
    assert row["amortization"] is None


def test_calibration_panel_counts_ranks_and_shows_the_binomial_band():
    ranks = torch.randint(0, 100, (4000, 2), generator=torch.Generator().manual_seed(0))
    figure, data = calibration_panel(Calibration(ranks, 99), labels=["slow", "fast"])
    check_close(data["counts"].sum(0), [4000, 4000], 1e-9)
    check_close(data["counts"][3], [int(((ranks[:, j] >= 15) & (ranks[:, j] < 20)).sum()) for j in range(2)], 1e-9)
    low, high = data["band"]
    assert low < 200 < high and abs((high - 200) - 2.576 * np.sqrt(4000 * 0.05 * 0.95)) < 2
    inside = (data["counts"] >= low) & (data["counts"] <= high)
    assert inside.mean() > 0.9
    assert [panel.get_title() for panel in figure.axes] == ["slow", "fast"]


def test_calibration_panel_draws_on_given_axes():
    _, axes = mpl.pyplot.subplots(1, 1)
    figure, _ = calibration_panel(Calibration(torch.zeros(10, 1, dtype=torch.long), 19), axes=axes)
    assert figure is axes.figure


@pytest.mark.parametrize(("call", "message"), [
    (lambda: portrait(cast.digits10()), "a portrait has one or two latents, digits10 has 10"),
    (lambda: portrait(cast.wave(), torch.zeros(10, 3, 1)), r"approximation must be samples \[S, 4, 1\] or have log_prob, got shape \(10, 3, 1\)"),
    (lambda: portrait_numbers(cast.wave(), Gaps(bound=torch.zeros(3))), r"bound must have one entry for each of the four points, got shape \(3,\)"),
    (lambda: write_portrait("2", {}), "chapter must be two digits, such as '01', got '2'"),
    (lambda: calibration_panel(Calibration(torch.zeros(10, 2, dtype=torch.long), 19), labels=["one"]), "labels must name 2 statistics, got 1"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
