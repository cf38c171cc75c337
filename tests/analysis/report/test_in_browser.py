"""A page in a browser: opened from disk it draws, sorts, filters, prints and fits; and nothing of a run can act in it."""

import numpy as np
import pytest
import xarray as xr
from hostile_names import HOSTILE as CORPUS

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}

# Ratio of luminances of every text to what lies behind it (WCAG 2, 1.4.3), the lowest first.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => { for (let e = element; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; } return [255, 255, 255, 255]; };
  const texts = [...document.body.querySelectorAll("*")].filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.tagName !== "SCRIPT");
  const ratio = (e) => { const [a, b] = [luminance(rgb(getComputedStyle(e).color)), luminance(behind(e))].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
  return texts.map((e) => [ratio(e), e.tagName + "." + e.className]).sort((x, y) => x[0] - y[0]);
}"""


def names(tab):
    return [cell.inner_text() for cell in tab.locator("#matrix-table tbody tr:visible th").all()]


def test_plots_are_drawn(visit, page):
    tab = visit(page)
    for plot in ("#plot-loss", "#plot-kappa"):
        canvas = tab.locator(f"{plot} canvas").first
        canvas.wait_for()
        # Not all of one colour.
        assert (
            canvas.evaluate("c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size") > 10
        )


def test_hovering_names_the_matrix(visit, page):
    tab = visit(page)
    plot = tab.locator("#plot-kappa canvas").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    # κ = 1000 of the layer 1 query projection is the topmost line.
    tooltip = tab.locator(".bk-tooltip-content", has_text="layers.1.attn.q_proj.weight")
    for y in np.arange(0, box["height"] / 2, 2):
        tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + y)
        tab.wait_for_timeout(30)
        if tooltip.count():
            assert "1,000.0" in tooltip.first.inner_text()
            return
    pytest.fail("no tooltip along the middle of the plot")


def test_a_click_on_a_heading_sorts(visit, page):
    tab = visit(page)
    recorded = names(tab)
    button = tab.get_by_role("button", name="κ", exact=False).first
    heading = tab.locator("#matrix-table th", has=button)
    assert heading.get_attribute("aria-sort") == "none"
    button.click()
    kappas = (10, 100, 1000, 20, 5)  # as the run was built
    assert names(tab) == [name for _, name in sorted(zip(kappas, recorded, strict=True))]
    assert heading.get_attribute("aria-sort") == "ascending"
    button.click()
    assert names(tab) == [name for _, name in sorted(zip(kappas, recorded, strict=True), reverse=True)]
    assert heading.get_attribute("aria-sort") == "descending"


def test_the_keyboard_sorts_and_what_was_not_recorded_stays_last(visit, page):
    tab = visit(page)
    button = tab.get_by_role("button", name="residual", exact=False)
    for _ in range(2):
        button.focus()
        tab.keyboard.press("Enter")
        assert names(tab)[-1] == "head.weight"
    assert button.evaluate("b => b.matches(':focus-visible')")
    assert button.evaluate("b => getComputedStyle(b).outlineStyle") == "solid"


def test_filters_leave_what_was_asked_for(visit, page):
    tab = visit(page)
    everything = names(tab)
    tab.get_by_label("Name", exact=True).fill("LAYERS.1")
    assert names(tab) == [name for name in everything if "layers.1" in name]
    tab.locator("#filter-operator").select_option("mlp_up")
    assert names(tab) == ["layers.1.mlp.up_proj.weight"]
    assert tab.locator("#filter-count").inner_text() == "1 of 5"
    tab.get_by_label("Name", exact=True).fill("")
    tab.locator("#filter-operator").select_option("")
    assert names(tab) == everything


def test_the_first_tab_stop_leads_past_the_contents(visit, page):
    tab = visit(page)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the findings"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "content"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(visit, page, scheme):
    tab = visit(page, color_scheme=scheme)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    luminance = sum(int(part) for part in tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")) / 3
    assert (luminance > 128) == (scheme == "light")
    ratios = tab.evaluate(CONTRAST)
    assert len(ratios) > 50
    assert ratios[0][0] >= 4.5, ratios[:3]


def test_the_chosen_colours_are_kept(visit, page):
    tab = visit(page, color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(background)
    tab.get_by_role("button", name="Show the page in dark colours").click()
    dark = tab.evaluate(background)
    assert dark != light
    tab.reload()
    assert tab.evaluate(background) == dark


def test_a_phone_scrolls_one_way(visit, page):
    tab = visit(page, **PHONE)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    # What is wider scrolls in its own box.
    box = tab.locator(".scroll", has=tab.locator("#matrix-table"))
    assert box.evaluate("b => b.scrollWidth > b.clientWidth && b.clientWidth <= 360")
    assert tab.locator("article img").first.evaluate("i => i.clientHeight") >= 250


def test_print_shows_everything_and_no_controls(visit, page):
    tab = visit(page, color_scheme="dark")
    assert tab.pdf().startswith(b"%PDF-")
    tab.emulate_media(media="print")
    assert not any(control.is_visible() for control in tab.locator(".control, nav").all())
    assert tab.evaluate("getComputedStyle(document.querySelector('#matrix-table thead')).display") == "table-header-group"
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert all(table.is_visible() for table in tab.locator("main table").all())
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.locator("main details[open]").count() == 0


def test_without_scripts_it_is_a_plain_document(browser, page):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(page.as_uri())
    assert len(names(tab)) == 5
    assert tab.locator("#matrix-table thead button").count() == 0
    assert not tab.locator("#filter-name").is_visible()
    assert not tab.locator("#theme").is_visible()
    assert all(image.is_visible() for image in tab.locator("article img").all())
    context.close()


HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "\"'><svg onload=alert(2)>",
    "a\n\u202eb\x1b[2J",
    "x" * 3000,
    "$\\frac{$ & {{7*7}} {% raw %} $$y$$ \\(z\\)",
    "]]>--><!--<b>κ 語",
    "javascript:alert(4)",
)


@pytest.fixture(scope="module")
def hostile(build_run, write):
    """A page whose every name, operator, class, version, scalar and attribute was chosen by somebody who means harm."""
    described = [
        {"sigma": np.geomspace(k, 1, 6), "optimizer": name if k % 2 else "Muon", "floor": k == 2} for k, name in enumerate(HOSTILE, start=2)
    ]
    run = build_run(
        dict(zip(HOSTILE, described, strict=True)),
        scalars={"<img src=x onerror=alert(3)>loss": [3.0, 2.0, 1.0]},
        attrs={
            "optimizers": [{"label": HOSTILE[0], "class": HOSTILE[1], "read_by": [HOSTILE[2]], "wrapped_by": [HOSTILE[5]],
                            "spectrum_of": [HOSTILE[4]], "groups": [{HOSTILE[0]: HOSTILE[1]}]}],
            "versions": {HOSTILE[0]: HOSTILE[1]}, "created": HOSTILE[1],
        },
    )  # fmt: skip
    texts = ("matrix", np.array(HOSTILE, dtype=np.dtypes.StringDType()))
    groups = {group.path: group.to_dataset() for group in run.subtree}
    run = xr.DataTree.from_dict({path: g.assign_coords(operator=texts) if "matrix" in g.dims else g for path, g in groups.items()})
    return write({f"{HOSTILE[0]}{HOSTILE[3]}.zarr": run})


def test_nothing_of_a_run_becomes_markup(hostile, page, parse):
    kinds = {element.tag for element in parse(page)}
    elements = parse(hostile)
    assert {element.tag for element in elements} <= kinds | {"p"}
    assert len([e for e in elements if e.tag == "img"]) == len([e for e in elements if e.tag == "article"])
    assert not any(name.startswith("on") for element in elements for name in element.attributes)
    text = hostile.read_text(encoding="utf-8")
    assert "{{7*7}}" in text
    # Reversed writing and escape sequences are spelled out.
    assert not {"\u202e", "\x1b"} & set(text)
    assert not any("x" * 161 in element.text for element in elements if element.tag == "main")


@pytest.mark.parametrize("settings", [{}, PHONE], ids=["desktop", "phone"])
def test_nothing_of_a_run_acts(visit, hostile, settings):
    tab = visit(hostile, **settings)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    for plot in ("#plot-loss", "#plot-kappa"):
        canvas = tab.locator(f"{plot} canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        for fraction in np.linspace(0.05, 0.6, 25):
            tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * fraction)
    tab.locator("#filter-operator").select_option(index=1)
    tab.get_by_role("button", name="κ", exact=False).first.click()
    # Pictures are drawn.
    tab.locator("article img").evaluate_all("all => Promise.all(all.map((image) => image.decode()))")
    assert tab.locator("main img, main svg").count() == tab.locator("article").count()
    assert tab.evaluate("document.documentElement.scrollWidth") <= (360 if settings else 1280)


def test_nothing_of_a_recorded_run_acts(hostile_run, visit, parse, tmp_path):
    """Of a run that hooks wrote, under every name of the corpus; `visit` fails on any request, error, dialog or refusal by the policy."""
    from optiscope.analysis import open_run
    from optiscope.analysis.report.page import write_report

    page = tmp_path / "report.html"
    write_report(
        {hostile_run.name: open_run(hostile_run)}, page, lambda studies: ("kappa_by_operator", "rms_alignment", "efficiency_table")
    )
    assert page.stat().st_size < 4_000_000  # of which 1.3 MB are the plotting library
    elements = parse(page)
    assert len([e for e in elements if e.tag == "img"]) == len([e for e in elements if e.tag == "article"]) == 3
    assert not {"svg", "iframe", "object", "embed", "link", "base", "form"} & {e.tag for e in elements}
    assert len([e for e in elements if e.tag in ("style", "script") and "type" not in e.attributes]) == 3
    assert not any(name.startswith("on") for e in elements for name in e.attributes)
    text = page.read_text(encoding="utf-8")
    assert all(c == "\n" or c.isprintable() for c in text.partition("<main")[2].partition("<script")[0])
    tab = visit(page)
    tab.on("dialog", lambda dialog: pytest.fail(dialog.message))
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert "mark" not in tab.title().split()
    assert tab.locator("#matrix-table tbody tr").count() == len(CORPUS)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
    for select in tab.locator("#filter-operator option").all()[1:4]:
        tab.locator("#filter-operator").select_option(select.get_attribute("value") or select.text_content())
    for plot in ("#plot-loss", "#plot-kappa"):
        box = tab.locator(f"{plot} canvas").first.bounding_box()
        tab.locator(f"{plot} canvas").first.scroll_into_view_if_needed()
        for fraction in np.linspace(0.1, 0.5, 6):
            tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * fraction)
    tab.wait_for_timeout(200)


def test_the_browser_would_have_refused_what_was_injected(browser, page, tmp_path):
    """The second line of defence: markup put into the page by hand loads nothing and runs nothing."""
    text = page.read_text(encoding="utf-8")
    injected = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script><img src='https://localhost:1/x'>"
    (tmp_path / "page.html").write_text(text.replace("<main", f"{injected}<main", 1), encoding="utf-8")
    context = browser.new_context()
    tab = context.new_page()
    failed = []
    tab.on("requestfailed", lambda request: failed.append(request.failure))
    tab.goto((tmp_path / "page.html").as_uri())
    assert "run" not in tab.title().split()
    assert all("csp" in reason.lower() or "blocked" in reason.lower() for reason in failed)
    context.close()
