"""The studio's server without a browser: who is let in, what it answers, what it keeps."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import threading
import time

import pytest
import torch
from PIL import Image
from torch import nn

import rewrite_core as rc
from rewrite_core.session import Session

pytest.importorskip("starlette", reason="the studio's server needs the extra `studio`")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")
from starlette.testclient import TestClient

from rewrite_core.studio.pixels import tiles
from rewrite_core.studio.server import make_app
from rewrite_core.studio.workshop import SESSION_FILE, Workshop

PORT = 8799
Z = rc.sample_latents(16, 40)


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (16, 1, 1)),
        nn.ConvTranspose2d(16, 8, 4),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 3, 3, padding=1),
        nn.Tanh(),
    ).eval()


@pytest.fixture(scope="module")
def session():
    layer = rc.bind(make(), "4")
    return Session(layer, rc.collect_second_moment(layer, Z, progress=False), Z)


@pytest.fixture
def shop(session, tmp_path):
    with Workshop(session, tmp_path / "studio").open() as shop:
        yield shop


@pytest.fixture
def client(shop):
    app = make_app(shop, PORT)
    with TestClient(
        app, base_url=f"http://127.0.0.1:{PORT}", cookies={f"rewrite_studio_{PORT}": app.state.token}
    ) as client:
        client.token = app.state.token
        yield client


def square(row, top, side=3):
    return rc.Selection.box(row, (top, top, top + side, top + side), (8, 8))


EDIT = json.loads(rc.Edit(copy=square(0, 1), paste=square(1, 4), context=[square(1, 4), square(2, 4)]).to_json())


def fit(client, **more):
    answer = client.post("/api/fit", json={"edit": EDIT, "settings": {"rank": 2}, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- who is let in


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/api/state", "/api/pictures.png?rows=0", "/nowhere"])
def test_no_token_no_answer(shop, path):
    with TestClient(make_app(shop, PORT), base_url=f"http://127.0.0.1:{PORT}") as stranger:
        answer = stranger.get(path)
        assert answer.status_code == 403 and "token" in answer.text
        assert stranger.get(path + ("&" if "?" in path else "?") + "token=wrong").status_code == 403


def test_the_token_in_the_address_opens_the_page(shop):
    app = make_app(shop, PORT)
    with TestClient(app, base_url=f"http://127.0.0.1:{PORT}") as visitor:
        page = visitor.get(f"/?token={app.state.token}")
        assert page.status_code == 200 and "rewrite studio" in page.text and app.state.token not in page.text
        assert "HttpOnly" in page.headers["set-cookie"] and "samesite=strict" in page.headers["set-cookie"].lower()
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert visitor.get("/api/state").status_code == 200  # by the cookie


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:1", ""])
def test_a_foreign_host_is_refused(client, host):
    assert client.get("/api/state", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", f"https://127.0.0.1:{PORT}"])
def test_a_foreign_origin_is_refused(client, origin):
    assert client.get("/api/state", headers={"Origin": origin}).status_code == 403
    assert client.get("/api/state", headers={"Origin": f"http://127.0.0.1:{PORT}"}).status_code == 200


@pytest.mark.parametrize("name", ["../server.py", "..%2fserver.py", "%2e%2e/server.py", "nothing.js", "/etc/passwd"])
def test_only_the_pages_own_files(client, name):
    assert client.get(f"/page/{name}").status_code == 404


# --- pictures


def test_pictures_are_the_generators(client, session):
    sheet = Image.open(io.BytesIO(client.get("/api/pictures.png?rows=3,0,9&side=8").content))
    assert sheet.size == (24, 8)
    with torch.no_grad():
        wanted = ((session.layer.generator(Z[[3, 0, 9]]) + 1) / 2 * 255).round().to(torch.uint8)
    found = torch.tensor(list(sheet.tobytes())).reshape(8, 3, 8, 3).permute(1, 3, 0, 2)
    assert torch.equal(found.to(torch.uint8), wanted)


def streamed(data):
    """What a stream holds: its lines, and the bytes that follow those of pictures."""
    found = []
    while data:
        line, _, data = data.partition(b"\n")
        told = json.loads(line)
        size = 4 * told["width"] * told["height"] * len(told["rows"]) if "rows" in told else 0
        found.append((told, data[:size]))
        data = data[size:]
    return found


def test_pictures_come_in_the_parts_that_were_asked_for(client, shop):
    found = streamed(client.get("/api/pictures?rows=3;0,9&side=8").content)
    assert [told for told, _ in found] == [{"rows": rows, "width": 8, "height": 8} for rows in ([3], [0, 9])]
    for told, data in found:
        assert data == tiles(shop.paint(told["rows"]), 8).data
    assert client.get("/api/pictures?rows=3;;9").status_code == 400
    assert client.get("/api/pictures?rows=3;99").json()["error"] == "There is no picture 99; the last one is 39."


def test_large_pictures_come_a_few_at_a_time(client, shop, monkeypatch):
    monkeypatch.setattr("rewrite_core.studio.workshop._PIXELS_AT_ONCE", 2 * 8 * 8)
    found = streamed(client.get("/api/pictures?rows=3,0,9;5&side=8").content)
    assert [told["rows"] for told, _ in found] == [[3, 0], [9], [5]]
    monkeypatch.setattr("rewrite_core.studio.workshop._PIXELS_AT_ONCE", 1)
    assert torch.allclose(shop.paint([3, 0, 9]), torch.cat([shop.paint([row]) for row in (3, 0, 9)]))


def test_a_fit_brings_its_pictures(client, shop):
    plain = streamed(client.get("/api/pictures?rows=1,5&side=8").content)
    asked = {"edit": EDIT, "settings": {"rank": 2}, "pictures": {"rows": "1,5", "side": 8}}
    (report, _), pictures = streamed(client.post("/api/fit", json=asked).content)
    assert report["rank"] == 2 and report["measured"] is None
    assert pictures[1] == tiles(shop.paint([1, 5]), 8).data != plain[0][1]
    for bad in ({"rows": "1"}, {"rows": [1], "side": 8}, {"rows": "1", "side": 0}, {"rows": "x", "side": 8}, []):
        assert client.post("/api/fit", json=asked | {"pictures": bad}).status_code == 400


def test_what_goes_wrong_in_a_stream_is_its_last_line(client, session, monkeypatch):
    original = session.images

    def images(rows, *more):
        return original(rows, *more) if 9 not in rows else 1 / 0

    monkeypatch.setattr(session, "images", images)
    *_, (told, _) = streamed(client.get("/api/pictures?rows=3;9;1&side=8").content)
    assert "division by zero" in told["error"]


@pytest.mark.parametrize(
    "query", ["", "rows=", "rows=-1", "rows=40", "rows=a", "rows=0&side=0", "rows=0&side=x", "rows=0&strength=nan"]
)
def test_bad_pictures_are_told(client, query):
    answer = client.get(f"/api/pictures.png?{query}")
    assert answer.status_code == 400 and answer.json()["error"].endswith(".")


# --- edits


def test_an_edit_is_what_rewrite_makes(client, shop, session):
    report = fit(client)
    change = rc.rewrite(
        session.layer, session.moment, rc.Edit.from_json(json.dumps(EDIT)).on(Z), Z, rank=2, loss="l2", region="map"
    )
    assert torch.equal(shop.live.coefficients, change.coefficients)
    assert report["size"] == pytest.approx(change.size) and report["measured"] is None
    with change, torch.no_grad():
        wanted = (session.layer.generator(Z[[5]]) + 1) / 2
    assert torch.equal(shop.paint([5]), wanted.clamp(0, 1))
    assert client.get("/api/differences?rows=1,5").json()[0] > 0
    assert client.delete("/api/fit").status_code == 200 and shop.live is None


def test_what_is_measured_is_what_rc_measure_says(client, shop, session):
    assert client.post("/api/measure").status_code == 400  # there is no change yet
    fit(client)
    found = client.post("/api/measure").json()
    report = rc.measure(shop.live, rc.Edit.from_json(json.dumps(EDIT)).on(Z), Z, moment=session.moment)
    assert found["verdict"] == report.verdict and found["reach"] == report.reach
    assert found["unrelated"] == report.unrelated and "rc." not in found["advice"]
    assert client.get("/api/state").json()["live"]["measured"] == found


def test_others_have_turns_while_it_is_measured(client, shop, session):
    """Pictures are painted with the change on and off in between, and the numbers are those of a quiet machine."""
    fit(client)
    answers, times, done = [], [], threading.Event()

    def paint():
        while not done.is_set():
            answers.append(client.get("/api/pictures.png?rows=1,2&side=8").content)
            times.append(time.monotonic())

    thread = threading.Thread(target=paint)
    thread.start()
    start = time.monotonic()
    found = client.post("/api/measure").json()
    end = time.monotonic()
    done.set()
    thread.join()
    assert len([at for at in times if start < at < end]) >= 2 and len(set(answers)) == 1
    session._kept.clear()
    assert client.post("/api/measure").json() == found


@pytest.mark.parametrize(
    ("method", "url"),
    [("DELETE", "/api/fit"), ("GET", "/api/pictures?rows=1&side=8&strength=0.5")],
    ids=["the change is gone", "a drag"],
)
def test_a_measurement_gives_way(method, url, client, shop, session, monkeypatch):
    fit(client)
    original, asked, go = session._measure, threading.Event(), threading.Event()

    def slow(given):
        asked.set()
        go.wait(10)
        return original(given)

    monkeypatch.setattr(session, "_measure", slow)
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(client.post("/api/measure").status_code))
    thread.start()
    asked.wait(10)
    assert client.request(method, url).is_success
    go.set()
    thread.join()
    assert statuses == [409]


def test_all_layers_are_tried(client, shop, session):
    client.put("/api/edit", json=EDIT)
    told = []
    shop.listen(told.append)
    found = client.post("/api/scan").json()
    scan = rc.scan_layers(session.layer.generator, rc.Edit.from_json(json.dumps(EDIT)).on(Z), Z, objective="value")
    assert found[0]["layer"] == scan.best.layer and found[0]["rank"] == scan.best.rank
    assert found[0]["score"] == pytest.approx(scan.best.score) and found[0]["picture"].startswith("data:image/png")
    assert len({row["layer"] for row in found}) == len(found)
    assert any(event["kind"] == "progress" for event in told)


def test_a_scan_is_stopped(client, shop):
    client.put("/api/edit", json=EDIT)
    shop.listen(lambda event: shop.cancel())
    assert client.post("/api/scan").json() == []


def test_a_page_knows_its_own_changes(client, shop):
    told = []
    shop.listen(told.append)
    client.post("/api/fit", json={"edit": EDIT}, headers={"X-Page": "one"})
    client.post("/api/rules", json={"name": "kept"}, headers={"X-Page": "two"})
    client.put("/api/rules/order", json=[1])
    assert [event["by"] for event in told if event["kind"] == "state"] == ["one", "two", ""]


def test_a_pages_edits_stay_in_the_order_in_which_it_sent_them(client, shop):
    """Whichever connection is faster: of one page the newest holds, and other pages are not held back by it."""
    older = {"paste": EDIT["paste"]}

    def send(edit, turn, page="one"):
        return client.put("/api/edit", json=edit, headers={"X-Page": page, "X-Turn": str(turn)}).status_code

    assert send(EDIT, 2) == 200 and send(older, 1) == 409 and "object" in json.loads(shop.edit_json)
    late = {"X-Page": "one", "X-Turn": "1"}
    assert client.post("/api/fit", json={"edit": older}, headers=late).status_code == 409 and shop.live is None
    assert send(older, 1, "two") == 200 and "object" not in json.loads(shop.edit_json)
    assert send(EDIT, 3) == 200 and "object" in json.loads(shop.edit_json)


def test_what_a_generator_raises_is_told(client, shop, session, monkeypatch):
    monkeypatch.setattr(session, "images", lambda *given: 1 / 0)
    answer = client.get("/api/pictures.png?rows=1")
    assert answer.status_code == 500 and "division by zero" in answer.json()["error"]


@pytest.mark.parametrize("kind", ["erase", "zero"])
def test_the_other_two_edits(client, shop, kind):
    shop.settings.units = 2
    assert fit(client, kind=kind)["kind"] == kind and shop.live is not None


def test_strength_scales_the_live_change(client, shop):
    fit(client)
    plain = shop.paint([5], original=True)
    changes = [(shop.paint([5], strength=s) - plain).abs().mean().item() for s in (0.0, 0.5, 1.0)]
    assert changes[0] == 0 and 0 < changes[1] < changes[2]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/fit", b"{"),
        ("POST", "/api/fit", b'{"edit": {"object": 5}}'),
        ("POST", "/api/fit", b'{"kind": "other"}'),
        ("POST", "/api/fit", b'{"settings": {"rank": "x"}}'),
        ("POST", "/api/fit", b'{"settings": {"rank": null}}'),
        ("POST", "/api/fit", b'{"settings": {"colour": 1}}'),
        ("PUT", "/api/edit", b"\xff\xfe"),
        ("PUT", "/api/edit", b'{"paste": [99, "data:image/png;base64,AAAA"]}'),
        ("POST", "/api/search", b"{}"),
        ("POST", "/api/search", b'{"selection": [0, "data:image/png;base64,AAAA"]}'),
        ("POST", "/api/rules", b'{"name": "none"}'),
        ("PUT", "/api/rules/order", b'["1"]'),
        ("PUT", "/api/rules/order", b'{"1": 2}'),
        ("PATCH", "/api/rules/77", b'{"name": "none"}'),
        ("DELETE", "/api/rules/77", None),
        ("POST", "/api/rules/file?name=a", b"no safetensors"),
        ("PUT", "/api/layer", b'{"name": "nowhere"}'),
        ("GET", "/api/rules/5/file", None),
    ],
)
def test_what_cannot_be_done_is_told_in_a_sentence(client, shop, method, path, body):
    answer = client.request(method, path, content=body)
    assert answer.status_code == 400 and answer.json()["error"].endswith(".") and len(answer.json()["error"]) < 500
    assert shop.live is None and not shop.rules


def test_a_newer_edit_replaces_a_waiting_one(client, shop, session, monkeypatch):
    go, original, started = threading.Event(), session.rewrite, threading.Event()

    def slow(edit, **options):
        started.set()
        go.wait(10)
        return original(edit, **options)

    monkeypatch.setattr(session, "rewrite", slow)
    statuses = []

    def ask():
        statuses.append(client.post("/api/fit", json={"edit": EDIT}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    threads[0].start()
    started.wait(10)
    for thread in threads[1:]:
        thread.start()
        while shop._latest._waiting is None:
            pass
    threading.Event().wait(0.3)
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 200, 409, 409]


def test_a_search(client):
    found = client.post("/api/search", json={"selection": EDIT["paste"], "top": 5}).json()
    assert len(found["rows"]) == len(found["heat"]) == 5 and found["rows"][0] in range(40)
    assert max(max(map(max, heat)) for heat in found["heat"]) == 1.0


# --- rules


def test_rules_are_kept_ordered_and_taken_off(client, shop):
    fit(client)
    assert client.post("/api/rules", json={"name": "first"}).json()["name"] == "first" and shop.live is None
    fit(client)
    client.post("/api/rules", json={"name": " second\n"})
    state = client.get("/api/state").json()
    assert [rule["name"] for rule in state["rules"]] == ["first", "second"] and state["conflicts"] == [[1, 2]]
    client.patch("/api/rules/2", json={"strength": -0.5})
    client.patch("/api/rules/1", json={"on": False, "name": "one"})
    client.put("/api/rules/order", json=[2, 1])
    assert [(r.number, r.name, r.on, r.strength) for r in shop.rules] == [
        (2, "second", True, -0.5),
        (1, "one", False, 1.0),
    ]
    file = client.get("/api/rules/2/file")
    assert "second.safetensors" in file.headers["content-disposition"]
    for values in ({"strength": "x"}, {"strength": 11}, {"number": 5}, [1]):
        assert client.patch("/api/rules/1", json=values).status_code == 400
    assert client.delete("/api/rules/1").status_code == client.delete("/api/rules/2").status_code == 200
    assert not shop.rules and not list(shop.folder.glob("rule-*"))
    assert client.post("/api/rules/file?name=back", content=file.content).json()["name"] == "back"
    assert not (shop.folder / "incoming.safetensors").exists()


def test_changes_of_rules_are_merged(client, shop):
    """Each says what it changes and nothing else, so that a page that has not heard of the last one takes none back."""
    for name in ("first", "second", "third"):
        fit(client)
        client.post("/api/rules", json={"name": name})
    client.patch("/api/rules/1", json={"name": "spires"})
    client.patch("/api/rules/1", json={"on": False})
    client.delete("/api/rules/2")
    client.put("/api/rules/order", json=[2, 1])  # of a page that knows 2 still, and not 3 yet
    assert [(rule.number, rule.name, rule.on) for rule in shop.rules] == [(1, "spires", False), (3, "third", True)]
    client.delete("/api/rules/3")
    fit(client)
    assert client.post("/api/rules", json={}).json()["number"] == 4  # a number that was used means no other rule


def test_the_checkpoint_holds_the_rules(client, shop, session):
    from safetensors.torch import load

    fit(client)
    state = load(client.get("/api/checkpoint.safetensors").content)
    assert torch.equal(state["4.weight"], shop.live.state_dict(session.layer)["4.weight"])
    assert torch.equal(state["1.weight"], session.layer.generator[1].weight)
    assert not any(change.applied for change in [shop.live])


def test_sheets_and_films(client):
    fit(client)
    assert Image.open(io.BytesIO(client.get("/api/sheet.png?rows=0,1").content)).width > 256
    film = Image.open(io.BytesIO(client.get("/api/walk.gif?rows=0,1").content))
    assert film.n_frames > 20
    assert client.get("/api/walk.avi?rows=0,1").status_code == 400


def test_an_mp4_where_ffmpeg_is_there(client, monkeypatch):
    if shutil.which("ffprobe") is None:
        pytest.skip("films are looked at with ffprobe, of Debian's ffmpeg")
    assert client.get("/api/state").json()["films"] == ["gif", "mp4"]
    film = client.get("/api/walk.mp4?rows=0,1,2").content
    asked = ["-v", "error", "-count_frames", "-show_entries", "stream=codec_name,width,nb_read_frames", "-of", "csv"]
    found = subprocess.run(["ffprobe", *asked, "-"], input=film, capture_output=True, check=True).stdout.decode()
    assert found.strip() == "stream,h264,256,48"
    monkeypatch.setenv("PATH", "")
    assert client.get("/api/state").json()["films"] == ["gif"]
    assert "not installed" in client.get("/api/walk.mp4?rows=0").json()["error"]


# --- what lasts


def test_all_of_it_is_there_after_a_crash(client, shop, session):
    fit(client)
    client.post("/api/rules", json={"name": "kept"})
    client.put("/api/edit", json={"paste": EDIT["paste"]})
    client.put("/api/settings", json={"rank": 7, "strength": 0.25})
    with Workshop(session, shop.folder).open() as again:
        state = again.describe()
    assert state["edit"]["paste"] == EDIT["paste"] and "object" not in state["edit"] and state["settings"]["rank"] == 7
    assert [rule["name"] for rule in state["rules"]] == ["kept"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 3}', '{"settings": {}, "edit": 5, "rules": []}'])
def test_a_broken_session_file_is_said_and_left_out(session, tmp_path, text):
    (tmp_path / SESSION_FILE).write_text(text)
    with pytest.warns(UserWarning, match="could not all be read"), Workshop(session, tmp_path).open() as shop:
        assert shop.describe()["rules"] == []


def test_another_layer_collects_its_statistics_and_keeps_them(client, shop):
    told = []
    shop.listen(told.append)
    names = [layer["name"] for layer in client.get("/api/layers").json()]
    assert names == ["1", "4", "6"]
    assert client.put("/api/layer", json={"name": "6"}).status_code == 200
    assert client.get("/api/state").json()["layer"] == "6" and (shop.folder / "moment-6.safetensors").exists()
    assert [event["done"] for event in told if event["kind"] == "progress"][-1] == 40
    fit(client)
