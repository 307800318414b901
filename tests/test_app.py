"""
The page of `prunesid app` in a real Chromium, with the embedded model, as a visitor uses it. Set `APP_SCREENSHOTS` to
a folder outside the checkout to look at what was seen.
"""

import concurrent.futures
import contextlib
import html
import io
import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from app_browser import SECONDS, SQUARES, visit
from PIL import Image
from tiny_clip import save_clip

from prunesid_cli import baselines


# Gradio's own warnings are not ours to mend, and its server runs in this process.
pytestmark = [pytest.mark.app, pytest.mark.filterwarnings("default::DeprecationWarning")]


@pytest.fixture(scope="module")
def page():
    """The address of the page, and its blocks."""
    from prunesid_cli.app_model import AppModel
    from prunesid_cli.app_page import build, example_pictures, launch

    blocks = build(AppModel(None, example_pictures()))
    yield launch(blocks, "127.0.0.1", None, is_waiting=False), blocks
    blocks.close()


@pytest.fixture(scope="module")
def visitor(page):
    with visit(page) as visitor:
        yield visitor


def scene(variant, seed):
    from prunesid_cli.scenes import make_scene

    return make_scene(variant, "test", seed)


def test_an_uploaded_picture_is_shown_and_asked_about(visitor, tmp_path):
    before = visitor.text("#sentences")
    scene("salient", 1).image.save(tmp_path / "mine.png")
    visitor.find("#file input[type=file]").send_keys(str(tmp_path / "mine.png"))
    visitor.wait(lambda: visitor.text("#sentences") not in ("", before))
    full, kept = visitor.ask("what word is printed?")
    assert full == "sale" and kept
    numbers = visitor.text("#numbers")
    assert re.search(r"visual tokens\)576649\.0 times less", numbers)
    assert re.search(r"first word\d+ ms\d+ ms\d", numbers) and re.search(r"KV cache\)3\.\d+ MB0\.\d+ MB", numbers)
    assert visitor.count("#picture .ps-kept") == 64 and visitor.count("#picture .ps-dropped") == SQUARES - 64
    for symbol in ("ρ = 0.", "φ = 1 − ρ = 0.", "τ = "):
        assert symbol in visitor.text("#sentences")
    assert [visitor.count(f"#strip figure:nth-child({place}) .ps-dropped") for place in (1, 2, 3, 4)] == [
        SQUARES - kept for kept in (192, 128, 64, 32)
    ]
    visitor.show("asked")


def test_sliding_changes_the_picture_and_takes_back_the_answers(visitor):
    from selenium.webdriver.common.keys import Keys

    visitor.ask("what word is printed?")
    number = visitor.find("#budget input[type=number]")
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("32", Keys.TAB)
    visitor.wait(lambda: visitor.count("#picture .ps-kept") == 32)
    assert visitor.text("#full textarea") == visitor.text("#kept textarea") == ""
    slider = visitor.find("#budget input[type=range]")
    slider.send_keys(Keys.ARROW_RIGHT)
    visitor.wait(lambda: visitor.count("#picture .ps-kept") == 33)
    slider.send_keys(Keys.END)
    visitor.wait(lambda: "nothing is dropped" in visitor.text("#status"))
    assert visitor.count("#picture .ps-dropped") == 0
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("64", Keys.TAB)
    visitor.wait(lambda: visitor.count("#picture .ps-kept") == 64)


def test_a_dynamic_budget_gives_plain_pictures_less(visitor, tmp_path):
    visitor.example("Balloons")
    visitor.find("#dynamic input[type=checkbox]").click()
    visitor.wait(lambda: visitor.count("#picture .ps-kept") not in (0, 64))
    busy = visitor.count("#picture .ps-kept")
    Image.new("RGB", (300, 300), (90, 140, 90)).save(tmp_path / "plain.png")
    visitor.upload(tmp_path / "plain.png")
    assert 1 <= visitor.count("#picture .ps-kept") < busy
    visitor.show("dynamic")
    visitor.find("#dynamic input[type=checkbox]").click()
    visitor.wait(lambda: visitor.count("#picture .ps-kept") == 64)


def test_a_clip_is_shown_frame_by_frame(visitor, tmp_path):
    """The embedded model reads pictures, so that the frame that is shown is asked about."""
    from selenium.webdriver.common.keys import Keys

    save_clip(tmp_path / "clip.mp4", [scene("salient", seed).image for seed in range(1, 9)])
    visitor.upload(tmp_path / "clip.mp4")
    visitor.wait(lambda: visitor.count("#part input[type=range]") == 1)
    visitor.wait(lambda: visitor.count("#picture .ps-kept") == 64)
    first = visitor.ask("what word is printed?")[0]
    picture = visitor.picture()
    visitor.find("#part input[type=range]").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    visitor.wait(lambda: visitor.picture() != picture)
    visitor.wait(lambda: visitor.text("#full textarea") == "")
    assert visitor.ask("what word is printed?")[0] != first == "sale"
    visitor.show("clip")
    visitor.example("Burgers")
    visitor.wait(lambda: visitor.count("#part input") == 0)


def test_a_method_that_reads_the_question_is_shown_in_the_page(visitor):
    from selenium.webdriver.common.keys import Keys

    box = visitor.find("#method input")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("FastV", Keys.ENTER)
    visitor.wait(lambda: "reach the last layer" in visitor.text("#status"))
    visitor.show("fastv")
    full, kept = visitor.ask("how many times does the burger appear?")
    assert full and kept
    box = visitor.find("#method input")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys("PruneSID, as the paper", Keys.ENTER)
    visitor.wait(lambda: "64 of 576 squares are kept" in visitor.text("#status"))


def test_pointing_at_a_square_tells_its_story_and_shows_what_suppressed_it(visitor):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    dropped = visitor.find("#picture rect[data-by]")
    ActionChains(visitor.driver).move_to_element(dropped).perform()
    story = visitor.text("#picture .ps-readout")
    assert re.match(r"Row \d+, column \d+: dropped\. Suppressed by the (kept|better) square in row \d+", story)
    assert "Group" in story and "Score" in story
    assert visitor.find("#picture .ps-by").get_attribute("data-i") == dropped.get_attribute("data-by")
    visitor.show("pointed")
    picture = visitor.find("#picture svg")
    ActionChains(visitor.driver).move_to_element_with_offset(picture, 0, 0).click().send_keys(
        Keys.ARROW_RIGHT, Keys.ARROW_UP
    ).perform()
    here = int(visitor.find("#picture .ps-here").get_attribute("data-i"))
    story = visitor.text("#picture .ps-readout")
    assert story.startswith(f"Row {here // 24 + 1}, column {here % 24 + 1}:")
    picture.send_keys(Keys.ARROW_DOWN)
    assert int(visitor.find("#picture .ps-here").get_attribute("data-i")) == here + 24


def test_two_methods_beside_each_other(visitor):
    visitor.driver.execute_script("document.querySelector('#compare button').click()")
    visitor.wait(lambda: visitor.count("#compare-button") == 1 and visitor.find("#compare-button").is_displayed())
    visitor.find("#compare-button").click()
    visitor.wait(lambda: visitor.count("#pair figure") == 2)
    both, first, second = (int(text) for text in re.findall(r"(\d+) (?:kept by both|only by)", visitor.text("#pair")))
    assert both + first == both + second == 64 and first > 0
    visitor.driver.execute_script("document.querySelector('#pair').scrollIntoView()")
    visitor.show("compared")


def test_the_code_gives_what_is_on_the_page(visitor, tmp_path, monkeypatch):
    import prunesid_cli.app_page as app_page

    visitor.driver.execute_script("scrollTo(0, 0)")
    visitor.example("A sign")
    visitor.wait(lambda: visitor.count("#pair figure") == 0)  # which was of another picture
    _, kept = visitor.ask()
    visitor.driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    visitor.driver.execute_script("document.querySelector('#code-accordion button').click()")
    visitor.wait(lambda: visitor.count("#copy") == 1 and visitor.find("#copy").is_displayed())
    visitor.find("#copy").click()
    visitor.wait(lambda: visitor.text("#copy") == "Copied")
    code = visitor.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert '"budget": 64' in code.replace("'", '"')
    monkeypatch.chdir(tmp_path)
    app_page.example_pictures()[2].save("picture.png")
    output, names = io.StringIO(), {}
    with contextlib.redirect_stdout(output):
        exec(compile(code, "copied", "exec"), names)
    assert output.getvalue().strip() == kept
    seen = names["explain"](names["model"], names["processor"], names["picture"])
    script = "return [...document.querySelectorAll('#picture .ps-kept')].map((cell) => Number(cell.dataset.i))"
    assert seen.kept.tolist() == visitor.driver.execute_script(script)
    assert (tmp_path / "kept.png").exists()


def test_a_wrong_file_and_an_unknown_word_are_sentences(visitor, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    before = visitor.text("#sentences")
    visitor.find("#file input[type=file]").send_keys(str(tmp_path / "notes.txt"))
    visitor.wait(lambda: "cannot be read as a picture" in visitor.text("#status [role=alert]"))
    assert visitor.text("#sentences") == before and visitor.count("#picture rect") == SQUARES
    visitor.show("wrong_file")
    visitor.ask("where is the zebra?")
    assert "does not know: “zebra”" in visitor.text("#status")
    visitor.type("")
    visitor.find("#ask").click()
    visitor.wait(lambda: "Type a question" in visitor.text("#status"))
    address = visitor.driver.find_element(
        "css selector", "input[placeholder='https://'], textarea[placeholder='https://']"
    )
    address.send_keys("http://127.0.0.1/picture.png\n")
    visitor.wait(lambda: "not on the public internet" in visitor.text("#status"))


def test_the_page_loads_nothing_from_elsewhere_and_says_no_error(visitor, page):
    asked = set()
    for entry in visitor.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    assert all(url.startswith((page[0], "data:", "blob:", "http://127.0.0.1")) for url in asked), asked
    assert not [entry for entry in visitor.driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_another_question_stops_the_answer(page, monkeypatch):
    from prunesid_cli.app_model import Answer, AppModel

    stopped = threading.Event()

    def talk(self, picture, question, stop, events, run):
        for count in range(1, 600):
            events.put(Answer("word " * count, 576, 0.1, 1))
            if stop.wait(0.1):
                return stopped.set()

    with visit(page) as visitor, monkeypatch.context() as patch:
        patch.setattr(AppModel, "_generate", talk)
        visitor.find("#ask").click()
        visitor.wait(lambda: visitor.text("#full textarea").startswith("word word"))
        visitor.type("is there any cat in the picture?")
        visitor.wait(lambda: visitor.text("#full textarea") == "")
        visitor.wait(stopped.is_set)
        assert visitor.text("#full textarea") == visitor.text("#kept textarea") == ""


def test_two_visitors_at_once_get_their_own_answers(page, visitor):
    with visit(page) as other:
        visitor.example("Burgers")
        other.example("A sign")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda one: one.ask("what word is printed?")[0], (visitor, other)))
        assert answers == ["stop", "park"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_and_the_dark(page, scheme):
    with visit((page[0] + f"?__theme={scheme}", None), width=360, height=4200) as visitor:
        visitor.ask()
        visitor.show(f"narrow_{scheme}")
        assert visitor.driver.execute_script("return document.documentElement.scrollWidth") <= 360
        assert visitor.find("#picture svg").size["width"] > 250
        corner = Image.open(io.BytesIO(visitor.driver.get_screenshot_as_png())).convert("L").getpixel((2, 300))
        assert (corner < 60) == (scheme == "dark"), corner
        unnamed = """return [...document.querySelectorAll("button, input, textarea, select")].filter((e) =>
            e.offsetParent && !(e.textContent.trim() || e.ariaLabel || e.title || e.labels?.length ||
            e.getAttribute("aria-labelledby"))).map((e) => e.outerHTML.slice(0, 200))"""
        assert visitor.driver.execute_script(unnamed) == []


def test_every_method_is_shown(page):
    from prunesid_cli import app_page

    [show] = {block.fn for block in page[1].fns.values() if block.name == "show"}
    picture = app_page.example_pictures()[1]
    [dropdown] = [block for block in page[1].blocks.values() if getattr(block, "elem_id", None) == "method"]
    offered = {method for _, method in dropdown.choices}
    others = {"full", "downsample-enlarged", "visionzip-dyn", "prunesid-paper", "prunesid-release", "prunesid-spread"}
    others |= {"prunesid-dyn"}  # the checkbox
    others |= {name for name in baselines.METHODS if name.endswith("-question")}  # need a processor that reads it
    assert offered >= {"paper", "release", "spread"} | set(baselines.METHODS) - others
    for method in offered:
        status, drawn, sentences, code, *_ = show(picture, "what word is printed?", 40, method, False)
        number = int(re.search(r">(\d+) of 576 squares (are kept|reach the last layer)", status)[1])
        is_inside = baselines.METHODS[method].place in ("llm", "both") if method in baselines.METHODS else False
        assert number <= 42 if is_inside else 36 <= number <= 40, method
        assert html.escape(app_page.name_of(method)[:8]) in status
        assert drawn.count("<title>") == SQUARES and "&tau;" in sentences
        compile(code, method, "exec")
    status, *_ = show(picture, "", 40, "no_such_method", False)
    assert "There is no method" in status and "alert" in status


def call(page, function, session, *data):
    """The output of an event of the page by the name of its function, as a browser asks for it."""
    url, blocks = page
    [index, *_] = [key for key, block in blocks.fns.items() if block.name == function]
    body = {"data": list(data), "fn_index": index, "session_hash": session, "event_data": None, "trigger_id": None}
    headers = {"Content-Type": "application/json"}
    joined = urllib.request.Request(f"{url}gradio_api/queue/join", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(joined) as answer:
        answer.read()
    with urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash={session}", timeout=SECONDS * 4) as stream:
        for line in stream:
            message = json.loads(line[5:]) if line.startswith(b"data:") else {}
            if message.get("msg") == "process_completed":
                return message["success"], message["output"]
    raise AssertionError("the stream ended early")


def test_twenty_visitors_are_served_in_turn(page):
    from prunesid_cli.app_model import Choice

    def one(number):
        session = f"visitor{number:020}"
        assert call(page, "<lambda>", session)[0]
        success, output = call(page, "show", session, None, "what word is printed?", 20 + number, "paper", False, 1)
        return success, json.dumps(output)

    assert Choice(20).budget == 20
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    for number, (success, output) in enumerate(answers):
        assert success and f"{20 + number} of 576 squares are kept" in output


@pytest.mark.parametrize("path", ["/etc/passwd", str(Path(__file__)), "setup.cfg", "../../../../etc/passwd"])
def test_no_file_of_the_server_is_read(page, path):
    for form in ("file=", "file/"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{page[0]}gradio_api/{form}{path}")
        assert caught.value.code in (403, 404)
    data = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    success, output = call(page, "open_file", f"reader{abs(hash(path)):020}", data)
    assert not success and "root:" not in json.dumps(output)


def test_an_upload_above_the_limit_is_refused(page):
    from prunesid_cli.app_upload import MAX_BYTES

    edge = "edge"
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    body = head + b"\0" * (MAX_BYTES + 1) + f"\r\n--{edge}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={edge}"}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"{page[0]}gradio_api/upload", body, headers))
    assert caught.value.code == 413
