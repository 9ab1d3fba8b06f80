"""The rendered book: every page is there, every figure is described, every number is the published one."""

import re

import pytest
import yaml
from bs4 import BeautifulSoup

from ood_lib import chapters, results
from ood_lib.domains import open_images
from ood_lib.files import project_root


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """Folder of the pages: those of `make book` if they are fresh, else built for these tests."""
    if chapters.html_is_fresh():
        return project_root() / "_build" / "html"
    return chapters.build_html(tmp_path_factory.mktemp("book")).parent


def listed_pages():
    toc = yaml.safe_load((project_root() / "_toc.yml").read_text())
    return [toc["root"], *(page["file"] for part in toc["parts"] for page in part["chapters"])]


def read(html, name):
    return BeautifulSoup((html / f"{name}.html").read_text("utf-8"), "html.parser")


def body(html, name):
    return read(html, name).find("article")


each_page = pytest.mark.parametrize("name", listed_pages())
each_chapter = pytest.mark.parametrize("slug", chapters.chapter_slugs())


def test_the_book_has_the_pages_of_its_contents_and_no_other(html):
    built = {p.relative_to(html).with_suffix("").as_posix() for p in html.rglob("*.html")}
    made_by_sphinx = {"index", "genindex", "search", "prf-prf"}
    pages = {name for name in built - made_by_sphinx if not name.startswith("_static/")}
    assert pages == set(listed_pages())


def test_every_chapter_stands_in_the_contents():
    pages = {page for page in listed_pages() if page.startswith("book/chapters/")}
    assert pages == {f"book/chapters/{slug}" for slug in chapters.chapter_slugs()}


@each_chapter
def test_the_latents_of_a_chapter_can_be_made(slug):
    """`make rebook` inverts them; a split with fewer images than asked for would end it."""
    for entry in chapters.latents_of(slug):
        split = entry.get("split", "fit")
        assert entry.get("n", 1) <= len(open_images(entry["domain"], split=split)), entry


@each_page
def test_a_page_has_one_title_and_text(html, name):
    article = body(html, name)
    assert len(article.find_all("h1")) == 1
    assert len(article.get_text().split()) > 20


@each_page
def test_every_figure_is_described(html, name):
    for image in body(html, name).find_all("img"):
        assert len(image.get("alt", "")) > 20, image.get("src")


@each_page
def test_every_picture_and_page_that_is_linked_exists(html, name):
    page = html / f"{name}.html"
    links = [i["src"] for i in body(html, name).find_all("img")]
    links += [a["href"] for a in body(html, name).find_all("a", href=True)]
    local = [x.partition("#")[0] for x in links if not re.match(r"[a-z]+:", x)]
    missing = [x for x in local if x and not (page.parent / x).exists()]
    assert not missing


@each_page
def test_no_page_shows_an_error_or_a_raw_value(html, name):
    text = read(html, name).get_text().replace("torch.tensor(", "")  # that is code, not output
    for absent in ("Traceback (most recent call last)", "np.float64(", "np.int64(", "tensor("):
        assert absent not in text
    assert "injected-parameters" not in str(read(html, name))


@each_chapter
def test_a_chapter_shows_at_least_two_figures(html, slug):
    assert len(body(html, f"book/chapters/{slug}").select("img[src*=_images]")) >= 2


def test_the_scorecard_shows_every_verdict_file(html):
    tables = body(html, "book/scorecard").find_all("table")
    rows = [
        [c.get_text(" ", strip=True) for c in r.find_all("td")]
        for r in tables[0].select("tbody tr")
    ]
    told = {row[0]: row[2:] for row in rows}
    published = results.ledger()
    assert set(told) == {verdict["criterion"] for verdict in published}
    for verdict in published:
        wanted, found, outcome, chapter = told[verdict["criterion"]]
        assert wanted.split()[2] == f"{verdict['threshold']:.6g}"  # "at least 2 ratio"
        assert found.split()[0] == f"{verdict['value']:.4g}"
        assert outcome.partition(":")[0] == verdict["verdict"]
        assert chapter == verdict["chapter"]


def test_the_scorecard_leaves_no_claim_out(html):
    text = body(html, "book/scorecard").get_text(" ")
    shown = set(re.findall(r"\b[TEQ]\d+[a-z]?\b", text))
    assert set(results.load_claims()) <= shown


def test_the_figure_of_the_readme_is_the_published_one():
    slug, name, path = chapters.README_FIGURE
    assert path in (project_root() / "README.md").read_text("utf-8")
    assert (project_root() / path).read_bytes() == chapters.figure_of(slug, name)
