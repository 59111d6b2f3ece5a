"""The report: what its files say, and the page in a real browser."""

import csv
import json
import math
import re

import helpers
import pytest

from corda_lora.compare.frontier import CurvePoint, Estimate, Point, summary
from corda_lora.report.charts import curves_edge, frontier_edge
from corda_lora.report.html import embedded, html_report
from corda_lora.report.markdown import markdown_report, plain, write_csv
from corda_lora.report.pictures import look
from corda_lora.report.report import write_report
from corda_lora.report.sentences import headline, settings
from corda_lora.report.tables import ratio_cell
from corda_lora.report.text import number, rate_text

TITLES = {"full": "Full fine-tuning", "lora": "LoRA", "kpm": "CorDA KPM, <anchored>", "big": "LoRA-GA"}
RATES = {"full": (1e-5, 5e-5), "lora": (2e-4, 5e-4, 1e-3), "kpm": (2e-3, 5e-3, 1e-2)}
LOSSES = {"full": (0.95, 0.86), "lora": (0.97, 0.92, 0.9), "kpm": (0.94, 0.87, 0.88)}
DRIFTS = {"full": (0.6, 1.4), "lora": (0.9, 1.1, 1.2), "kpm": (0.008, 0.04, 0.1)}


def run(method, rate, seed, loss, drift):
    loss += 0.001 * (seed - 1) * (-1 if method == "kpm" else 1)
    return {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "status": "done",
        "why": "",
        "results": {
            "learn": {"gsm8k": {"loss": loss, "recall": 0.0, "exact_match": 0.01}},
            "keep": {
                name: {"loss": 4.4, "drift": drift * f, "agreement": 0.9} for name, f in (("nq", 1.0), ("webq", 1.2))
            },
            "text": {"wiki": {"loss": 3.1, "perplexity": 22.2, "drift": 0.1 * (1.1 - loss)}},
            "choices": {"arc": {"accuracy": 0.47 + 0.01 * seed}},
        },
        "curve": [[step, step / 3, loss + 0.3 * math.exp(-step / 40)] for step in range(15, 151, 15)],
        "steps": 150,
        "seconds": 50.0,
        "prepare_seconds": 3.0 if method == "kpm" else 0.0,
        "peak_bytes": 9.1e9,
        "commit": "abc1234",
        "machine": "NVIDIA H200",
        "parameters": {"adapter": 0 if method == "full" else 9.77e6, "trainable": 4.88e6},
    }


def comparison():
    """Four methods, three seeds each, one run that diverged, and a method that does not fit."""
    runs = [
        run(method, rate, seed, loss, drift)
        for method in RATES
        for rate, loss, drift in zip(RATES[method], LOSSES[method], DRIFTS[method])
        for seed in range(3)
    ]
    runs.append(run("full", 1e-3, 0, 3.5, 6.0))  # far outside
    lost = {"learning_rate": 2e-4, "seed": 0}
    runs.append({"method": "full", **lost, "status": "diverged", "why": "the loss was nan at step 12 | </script><b>"})
    runs.append({"method": "big", **lost, "status": "does not fit", "why": "LoRA-GA needs full weights"})
    return {
        "name": "keep & learn",
        "command": "corda compare recipe.yaml --output runs",
        "recipe": {"model": "smollm2", "train": {"max_steps": 150, "rates": [1e-5, 0.5]}, "note": "</script>"},
        "machine": "NVIDIA H200",
        "versions": {"torch": "2.11.0", "peft": "0.21.2"},
        "commit": "abc1234",
        "methods": {method: {"title": title, "source": f"{method}’s paper"} for method, title in TITLES.items()},
        "base": {
            "learn": {"gsm8k": {"loss": 1.429, "recall": 0.0, "exact_match": 0.0}},
            "keep": {"nq": {"loss": 4.4}, "webq": {"loss": 5.2}},
            "text": {"wiki": {"loss": 3.2, "perplexity": 24.5}},
            "choices": {"arc": {"accuracy": 0.45}},
        },
        "runs": runs,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report(folder, comparison())
    return folder


def test_the_files(folder):
    names = {
        "report.html",
        "report.md",
        "runs.csv",
        *(f"{n}.{k}" for n in ("frontier", "curves") for k in ("png", "svg")),
    }
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_bytes_again(folder, tmp_path):
    write_report(tmp_path, comparison())
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_csv_has_a_row_for_each_run(folder):
    with (folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(comparison()["runs"])
    assert rows[0]["keep nq drift"] == "0.6"
    assert rows[0]["trainable parameters"] == "4880000.0"
    assert (rows[0]["commit"], rows[0]["machine"]) == ("abc1234", "NVIDIA H200")
    assert rows[-1]["status"] == "does not fit"
    assert rows[-1]["learn gsm8k loss"] == ""
    assert rows[-2]["why"] == "the loss was nan at step 12 | </script><b>"


def markdown_tables(text):
    """Each table of a Markdown page: its rows as dicts by heading."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *body = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        assert all(len(row) == len(head) for row in body)
        yield [dict(zip(head, row)) for row in body]


def test_markdown(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    methods, _soon, beside, *_ = markdown_tables(text)
    rows = {row["method"]: row for row in methods}
    kpm = rows["CorDA KPM, &lt;anchored>"]
    assert kpm["learning rate"] == "5e-3"
    assert kpm["times less drift than LoRA: nq, median"] == "**87** (81 to 93)"
    assert rows["LoRA"]["learning rate"] == "1e-3 (at the high end of its sweep)"
    assert rows["Full fine-tuning"]["task loss: gsm8k"] == "**0.8600** (± 0.0025)"
    assert kpm["drift at LoRA’s task loss: nq"].startswith("**0.0201** (")  # 0.04·(0.008/0.04)^(0.03/0.07)
    assert rows["LoRA"]["drift at LoRA’s task loss: nq"].startswith("1.20 (")
    assert rows["Full fine-tuning"]["runs: done"] == "7 of 8 (1 diverged)"
    assert rows["LoRA-GA"]["runs: done"] == "0 of 1 (1 does not fit)"
    assert rows["base model"]["right answers: arc"] == "45.0%"
    assert not any("exact" in heading for heading in kpm)  # 1 % says nothing …
    assert "Exact match on gsm8k is at most 1.0%" in text  # … and the page says that
    assert {row["method"] for row in beside} == {"Full fine-tuning", "CorDA KPM, &lt;anchored>"}
    assert (
        "At LoRA’s best task loss on gsm8k (0.9000), CorDA KPM, &lt;anchored> drifts 60 times less than LoRA on nq"
        in text
    )
    assert "LoRA’s best learning rate (1e-3): at the high end of its sweep, so other rates may do better." in text
    soon = text[text.index("## How fast losses were reached") :].splitlines()
    assert soon[2].count("steps to a held-out loss of") == soon[2].count("seconds to a held-out loss of") == 4
    assert any(line.startswith("| LoRA |") for line in soon[4:10])
    for part in (
        "](frontier.png)",
        "](curves.png)",
        "corda compare recipe.yaml",
        "torch 2.11.0",
        "NVIDIA H200",
        "abc1234",
    ):
        assert part in text
    assert "| train.max_steps | 150 |" in text
    below = text[text.index("| LoRA-GA |") : text.index("## How fast")]
    learned, kept, *_ = below.strip().splitlines()[2:]
    at = "at each method’s best learning rate"
    times = "Full fine-tuning (1.77 times), LoRA (1.7 times), CorDA KPM, &lt;anchored> (1.75 times)"
    assert learned.startswith(f"- gsm8k, {at}: learned by {times}; in brackets how many times as likely")
    assert kept.replace("\u00a0", " ").startswith(
        f"- nq, {at}: not kept by Full fine-tuning (84 %), LoRA (77 %); kept well by CorDA KPM, &lt;anchored> (14 %)"
    )
    assert "LoRA-GA needs full weights" in text
    assert r"the loss was nan at step 12 \| &lt;/script>" in text  # a bar does not break its table


def first_sentence(compared):
    return re.search(r"<h1>(.*?)</h1>", html_report(compared))[1]


def test_the_first_sentence_says_what_the_data_says():
    compared = comparison()
    assert re.search(
        r"60 times less than LoRA on nq \(95\u00a0% interval over 3 seeds: \d+ to \d+\)", first_sentence(compared)
    )
    sure = r"both reach, 0.9000 to 0.9400 \(95\u00a0% interval over 3 seeds: \d+ to \d+\)\."
    assert re.search(sure, html_report(compared))
    compared["runs"] = [r for r in comparison()["runs"] if r["seed"] == 0]
    assert "no interval" in first_sentence(compared)
    unsure = "to 0.9410 (no interval for 100% of these losses, as a rate next to them was run with one seed)."
    assert unsure in html_report(compared)
    compared["runs"] = [r for r in comparison()["runs"] if r["method"] != "kpm"]
    for entry in compared["runs"]:
        if entry["method"] == "full" and entry["status"] == "done":
            entry["results"]["keep"]["nq"]["drift"] *= 5
    assert "Full fine-tuning ends at the lowest task loss" in first_sentence(compared)  # what was not found comes last
    assert "no other method that reaches it drifts clearly less than LoRA on nq" in html_report(compared)
    compared["runs"] = [r for r in comparison()["runs"] if r["method"] == "kpm" and r["learning_rate"] == 2e-3]
    compared["runs"] += [r for r in comparison()["runs"] if r["method"] == "lora"]
    assert "No other method was measured on both sides" in html_report(compared)
    compared["runs"] = [r for r in comparison()["runs"] if r["method"] == "lora"]
    assert first_sentence(compared).startswith("Only LoRA is done")
    compared["runs"] = [r for r in comparison()["runs"] if r["status"] != "done"]
    assert "No run is done" in first_sentence(compared)


@pytest.mark.parametrize(("less", "named"), [(1.5, "CorDA KPM, <anchored>"), (3, "Lucky")])
def test_without_seeds_it_takes_twice_as_much_to_come_first(less, named):
    compared = comparison()
    compared["methods"]["lucky"] = {"title": "Lucky", "source": ""}
    for entry in comparison()["runs"]:
        if entry["method"] == "kpm" and entry["seed"] == 0:
            entry["results"]["keep"]["nq"]["drift"] /= less
            compared["runs"].append(entry | {"method": "lucky"})
    at, over, *_ = headline(compared, summary(compared))
    assert at.startswith("At LoRA’s best task loss")
    assert "over half of the task losses" in over
    assert all(f"{named} drifts" in sentence for sentence in (at, over))


def test_a_difference_that_seeds_could_explain_says_so():
    compared = comparison()
    compared["runs"] = [r for r in compared["runs"] if r["method"] in ("kpm", "lora")]
    for entry in compared["runs"]:
        if entry["method"] == "kpm":
            entry["results"]["keep"]["nq"]["drift"] *= 55 * (1.5, 1.0, 0.5)[entry["seed"]]
    assert "the seeds’ spread could explain it" in first_sentence(compared)


def test_what_learns_most_comes_first_where_nothing_is_kept():
    compared = comparison()
    for entry in compared["runs"]:
        entry.get("results", {}).pop("keep", None)
    assert first_sentence(compared) == (
        "Full fine-tuning ends at the lowest task loss, 0.8600 ± 0.0025, against LoRA’s 0.9000 ± 0.0025; "
        "seed by seed the difference is −0.0400 ± 0.0000."
    )
    assert "needs the fewest steps to reach LoRA’s final loss" in html_report(compared)
    compared["runs"] = [r for r in compared["runs"] if r["seed"] == 0]
    assert "(too few seeds to be sure)" in first_sentence(compared)
    compared["runs"] = [r for r in compared["runs"] if r["method"] in ("full", "lora")]
    for entry in (
        run("full", 5e-5, 1, 0.9, 1),
        run("full", 5e-5, 2, 0.93, 1),
        *(run("lora", 1e-3, s, 0.9, 1) for s in (1, 2)),
    ):
        compared["runs"].append({**entry, "results": {"learn": entry["results"]["learn"]}})
    difference = "seed by seed the difference is −0.0033 ± 0.0872: the seeds’ spread could explain it."
    assert difference in first_sentence(compared)


@pytest.mark.parametrize("left", ["learn only", "nothing done", "text only", "one run"])
def test_recipes_that_measure_less(left, tmp_path):
    compared = comparison()
    kinds = {"learn only": ("learn",), "text only": ("learn", "text")}.get(left)
    if left == "nothing done":
        compared["runs"] = compared["runs"][-2:]
    if left == "one run":
        compared["runs"] = compared["runs"][:1]
    for entry in compared["runs"] if kinds else []:
        if "results" in entry:
            entry["results"] = {kind: entry["results"][kind] for kind in kinds}
    write_report(tmp_path, compared)
    assert (tmp_path / "curves.svg").exists()
    assert (tmp_path / "frontier.svg").exists() == (left not in ("learn only", "nothing done"))
    assert "nan" not in (tmp_path / "report.html").read_text().split("<h1>")[1].split("</h1>")[0].lower()


def test_numbers_that_are_none_do_not_break_the_page():
    compared = comparison()
    compared["runs"][0]["results"]["learn"]["gsm8k"]["loss"] = math.nan
    compared["runs"][4]["results"]["keep"]["nq"]["drift"] = math.inf
    compared["runs"][5]["curve"][3][2] = math.nan
    compared["runs"][6]["results"]["text"]["wiki"]["drift"] = 0.0
    page = html_report(compared)
    assert json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["task"] == "gsm8k"
    assert json.loads(embedded({"a": [math.nan, -math.inf, 1.5], "b": "</script><!--"})) == {
        "a": [None, None, 1.5],
        "b": "</script><!--",
    }
    assert "<" not in embedded("</script>")


def test_the_page_asks_for_nothing_and_escapes_what_it_is_given(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2  # the data and the program
    assert "<anchored>" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:,)|@import|url\((?!#)|fetch\(|XMLHttpRequest", page)
    assert "{{" not in page


def test_names_are_shown_as_they_are(tmp_path):
    """In the page, in Markdown and in pictures, whose library would read mathematics between dollars."""
    harm = "<script>x</script> $\\frac{$ =HYPERLINK(1) | [/red]"
    compared = json.loads(json.dumps(comparison()).replace("gsm8k", json.dumps(harm)[1:-1]))
    compared["name"] = harm
    compared["methods"]["lora"]["title"] = harm
    write_report(tmp_path, compared)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>x" not in page
    assert "&lt;script&gt;x&lt;/script&gt; $\\frac{$ =HYPERLINK(1) | [/red]" in page
    assert "<script>x" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "$\\frac{$ =HYPERLINK(1) | [/red]" in (tmp_path / "curves.svg").read_text(encoding="utf-8")
    with (tmp_path / "runs.csv").open(newline="", encoding="utf-8") as file:
        assert not any(name.startswith("=") for name in next(csv.reader(file)))


def test_pictures_leave_out_what_lies_far_outside(folder, tmp_path):
    def points_of(*pairs):
        return [Point(i, loss, drift, {0: (loss, drift)}) for i, (loss, drift) in enumerate(pairs)]

    line, far = points_of((0.90, 1.0), (0.94, 0.5), (0.95, 1.2)), points_of((0.93, 2.0), (3.5, 5.0))
    assert 0.95 <= frontier_edge([line, far]) < 1.0
    assert frontier_edge([points_of((0.90, 0.1), (0.92, 0.5), (0.94, 1.0))]) > 0.94  # a hull of one point
    curves = [[CurvePoint(0, 0, 1.1), CurvePoint(9, 9, 0.9)], [CurvePoint(0, 0, 1.0), CurvePoint(9, 9, 0.9)]]
    broken = [CurvePoint(0, 0, 8.5), CurvePoint(9, 9, 0.95)]
    assert 1.1 < curves_edge([*curves, broken]) < 1.5

    assert "some points lie outside: Full fine-tuning" in (folder / "frontier.svg").read_text()
    assert "some points lie outside" not in (folder / "curves.svg").read_text()
    compared = comparison()
    for entry in compared["runs"]:
        if entry["method"] == "kpm":
            entry["curve"][0][2] = 8.5
    write_report(tmp_path, compared)
    assert "some points lie outside: CorDA KPM" in (tmp_path / "curves.svg").read_text()


def test_an_interval_that_says_nothing_is_not_printed():
    assert ratio_cell(Estimate(0.5, 0.2, 3.0, 3)).extra == "0.20 to 3.0"
    assert ratio_cell(Estimate(0.85, 3.6e-6, 2e5, 2)).extra == "not settled by its seeds"
    assert ratio_cell(Estimate(0.85, None, None, 1)).extra == ""


def test_numbers_read_well():
    assert [number(x) for x in (0.021834, 1.1971, 73.34, 0, 1234.5, math.nan, None)] == [
        *("0.0218", "1.20", "73.3", "0", "1,234", "—", "—"),
    ]
    assert (number(2.34e-6), number(1.5e8)) == ("2.34e-6", "1.5e8")
    assert [rate_text(x) for x in (5e-4, 1.5e-3, 0.1, 1, 20)] == ["5e-4", "1.5e-3", "1e-1", "1e0", "2e1"]
    assert list(settings({"a": {"b": 1, "c": {}}, "d": None})) == [("a.b", "1"), ("a.c", "{}"), ("d", "null")]
    assert len({(str(look(i)["color"]), look(i)["marker"], look(i)["linestyle"]) for i in range(16)}) == 16


# --- in a browser

PROBE = """
<script>
const out = { width: innerWidth, system: matchMedia("(prefers-color-scheme: dark)").matches };
const wait = () => new Promise((done) => setTimeout(done, 30));
const overflow = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
const names = (table) => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
(async () => {
  await wait();
  for (const details of document.querySelectorAll("details")) details.open = true;
  out.overflow = overflow();
  const clipped = (t) => { const b = t.getBoundingClientRect(), s = t.ownerSVGElement.getBoundingClientRect();
    return b.left < s.left - 1 || b.right > s.right + 1 || b.top < s.top - 1 || b.bottom > s.bottom + 1; };
  out.clipped = [...document.querySelectorAll(".chart text")].filter(clipped).map((t) => t.textContent);
  out.colors = [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color];
  document.getElementById("theme").click();
  out.toggled = [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color];
  document.getElementById("theme").click();
  out.back = getComputedStyle(document.body).backgroundColor;
  const table = document.querySelector("#methods table");
  const heads = [...table.querySelectorAll("thead th:not([colspan])")];
  out.sorted = {};
  for (const [i, head] of heads.entries()) {
    const orders = [];
    for (let k = 0; k < 2; k++) {
      head.querySelector("button").click();
      const cells = [...table.tBodies[0].rows].map((row) => row.cells[i].textContent);
      orders.push([head.getAttribute("aria-sort"), names(table), cells]);
    }
    out.sorted[i + " " + head.textContent] = orders;
  }
  out.marked = table.querySelectorAll("[aria-sort]").length;
  out.best = [...table.querySelectorAll("td.best")].map((td) => td.firstChild.data.trim());
  const marks = () => document.querySelectorAll("#frontier g path").length;
  out.marks = [marks()];
  const said = (chart) => [...document.querySelectorAll(chart + " svg > text")].map((t) => t.textContent).join(" ");
  out.outside = ["#frontier", "#curves"].map((chart) => /lie outside: .*/.exec(said(chart))?.[0].split(" base")[0]);
  const legends = [...document.querySelectorAll('.legend button[data-method="lora"]')], [legend] = legends;
  legend.click();
  out.marks.push(marks());
  out.pressed = legends.map((button) => button.getAttribute("aria-pressed"));
  legend.click();
  const title = () => document.querySelectorAll("#frontier .title")[1].textContent;
  out.abilities = [title()];
  document.querySelector('#ability button[data-value="2"]').click();
  out.abilities.push(title());
  document.querySelector('#axis button[data-value="seconds"]').click();
  out.axis = document.querySelector("#curves .title").textContent;
  const svg = document.querySelector("#curves svg"), mark = svg.querySelector("g path").getBoundingClientRect();
  const at = { clientX: mark.left + mark.width / 2, clientY: mark.top + mark.height / 2 };
  svg.dispatchEvent(new PointerEvent("pointermove", at));
  out.tip = document.querySelector("#curves .tip:not([hidden])").textContent;
  const select = document.getElementById("reference");
  out.beside = [names(document.querySelector("#beside table"))];
  select.value = "kpm";
  select.onchange();
  out.beside.push(names(document.querySelector("#beside table")));
  select.value = "big";
  select.onchange();
  out.beside.push(document.getElementById("beside").textContent);
  document.querySelector(".legend .all").click();
  document.querySelector(".legend .all").click();
  out.end = overflow();
  parent.postMessage(JSON.stringify(out), "*");
})();
</script></body>"""


@pytest.fixture(scope="module", params=["light", "dark"])
def browser(request, folder, tmp_path_factory):
    """The page, used: what a script saw in it at 1280 and 390 pixels, for a reader who likes `param`; the console."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    return helpers.browse(page, PROBE, tmp_path_factory.mktemp("browser"), request.param)


def test_browser_opens_it_without_a_word_in_the_console(browser):
    assert browser["console"] == []
    assert [page["width"] for page in browser["pages"]] == [1280, 390]


def test_browser_nothing_is_wider_than_the_page_nor_cut_off(browser):
    for page in browser["pages"]:
        assert (page["overflow"], page["end"], page["clipped"]) == (0, 0, [])


def test_browser_both_themes(browser):
    light, dark = "rgb(251, 251, 249)", "rgb(19, 21, 24)"
    for page in browser["pages"]:
        assert page["system"] == (browser["theme"] == "dark")
        assert page["colors"][0] == page["back"] == (dark if browser["theme"] == "dark" else light)
        assert page["toggled"][0] == (light if browser["theme"] == "dark" else dark)
        assert page["colors"][1] != page["toggled"][1]


def test_browser_sorts_by_every_column_both_ways(browser):
    for page in browser["pages"]:
        assert page["marked"] == 1
        for heading, ((first, names, cells), (second, backward, _)) in page["sorted"].items():
            assert {first, second} == {"ascending", "descending"}, heading
            assert sorted(names) == sorted(backward) == sorted(TITLES.values())
            empty = sum(cell.startswith("—") for cell in cells)
            assert all(cell.startswith("—") for cell in cells[len(cells) - empty :]), heading  # last in both directions
            assert names[-1] == backward[-1] == "LoRA-GA" or not empty, heading
        (direction, names, _), (_, backward, _) = page["sorted"]["2 gsm8k"]
        assert direction == "ascending"
        assert names == ["Full fine-tuning", "CorDA KPM, <anchored>", "LoRA", "LoRA-GA"]
        assert backward == ["LoRA", "CorDA KPM, <anchored>", "Full fine-tuning", "LoRA-GA"]
        (direction, names, _), _ = page["sorted"]["0 method"]
        assert names == sorted(TITLES.values(), key=str.lower)
        assert "0.8600" in page["best"]


def test_browser_charts_follow_their_controls(browser):
    for page in browser["pages"]:
        assert page["marks"] == [8, 5]  # without LoRA's three; the one far outside is in neither
        assert page["outside"][0].startswith("lie outside: Full fine-tuning")
        assert page["outside"][1] is None
        assert page["pressed"] == ["false", "false"]
        assert page["abilities"][0] == "drift on nq (nats per token)"
        assert page["abilities"][1] == "drift on wiki (nats per token)"
        assert page["axis"] == "seconds"
        assert page["tip"].startswith("Full fine-tuning")
        assert page["beside"][0] == ["Full fine-tuning", "CorDA KPM, <anchored>"]
        assert page["beside"][1] == ["Full fine-tuning", "LoRA"]
        assert "No other method" in page["beside"][2]


def test_markdown_and_csv_escape_what_came_from_data(tmp_path):
    harm = "=HYPERLINK(1) <script>x</script> | e"
    assert plain(harm) == "=HYPERLINK(1) &lt;script>x&lt;/script> \\| e"
    runs = [{"method": harm, "learning_rate": -1.0, "why": "@x", "results": {"keep": {"-y": {"drift": -0.5}}}}]
    write_csv(tmp_path / "runs.csv", {"runs": runs})
    with (tmp_path / "runs.csv").open(newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    assert (row["method"], row["why"], row["learning_rate"]) == ("'" + harm, "'@x", "-1.0")
    assert row["keep -y drift"] == "-0.5"


def test_a_sweep_is_read_near_loras_best_and_so_is_what_nobody_named():
    """The named ability's hull lies between "keep 3" and "keep 30" there; the unnamed one is better at "keep 0"."""
    compared = comparison()
    assert "nobody named" not in html_report(compared) + markdown_report(compared)
    compared["recipe"]["context"] = "nq_context.jsonl"
    compared["runs"] = [r for r in comparison()["runs"] if r["method"] in ("lora", "full")]
    compared["methods"] = {name: compared["methods"][name] for name in ("lora", "full", "kpm")}
    settings = {0: (0.91, 0.04, 0.03), 3: (0.90, 0.02, 0.1), 30: (0.91, 0.01, 0.2)}
    for value, (loss, nq, webq) in settings.items():
        entry = run("kpm", 1e-2, 1, loss, nq) | {"swept": {"keep": value}, "predicted_drift": nq / 2}
        entry["results"]["keep"]["webq"]["drift"] = webq
        compared["runs"].append(entry)
    text = markdown_report(compared)
    tables = list(markdown_tables(text))
    best = next(row for row in tables[0] if row["method"].startswith("CorDA"))
    assert best["learning rate"].startswith("1e-2, keep 3 (the only rate tried")
    assert best["drift at LoRA’s task loss: nq"] == "**0.0200** (1e-2, keep 3)"
    assert best["drift at its own task loss: predicted, of the context"] == "0.0100"
    lora, _full, kpm = tables[1]
    assert kpm["settings"] == "1e-2, keep 3 … 1e-2, keep 30"
    assert kpm["drift at a task loss of 0.9050: nq"] == "**0.0141**"  # √(0.02·0.01)
    assert kpm["drift at a task loss of 0.9050: webq, not named"] == "**0.141**"  # √(0.1·0.2): at the same settings
    assert lora["drift at a task loss of 0.9050: webq, not named"].startswith("1.4")
    ratio = float(re.search(r"[\d.]+", kpm["times less than LoRA: webq, not named"])[0])
    assert ratio == pytest.approx(1.42 / 0.141, rel=0.05)
    assert kpm["nq, over task losses: up to 0.9050: the most times less than LoRA"].startswith("**8")
    assert kpm["nq, over task losses: that both reach: the least times less than LoRA"].startswith("**60")
    assert "At a task loss at most 0.005 above LoRA’s best (0.9000), CorDA KPM, &lt;anchored> drifts 8" in text
    page = html_report(compared)
    assert "Near LoRA’s best task loss, and what nobody named" in page
    assert "learning rate 1e-2, keep 30, 1 seed" in page
