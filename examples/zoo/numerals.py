"""Whole numbers from 1 to 9999 written in words and in Roman numerals."""

from collections.abc import Callable


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ENGLISH_SMALL = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
ENGLISH_TENS = _words("_ _ twenty thirty forty fifty sixty seventy eighty ninety")

GERMAN_SMALL = _words(
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
    "fünfzehn sechzehn siebzehn achtzehn neunzehn"
)
GERMAN_TENS = _words("_ _ zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")

SPANISH_SMALL = _words(
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince "
    "dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés "
    "veinticuatro veinticinco veintiséis veintisiete veintiocho veintinueve"
)
SPANISH_TENS = _words("_ _ _ treinta cuarenta cincuenta sesenta setenta ochenta noventa")
SPANISH_HUNDREDS = _words(
    "_ ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos "
    "ochocientos novecientos"
)

ROMAN_STEPS = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip


def english(number: int) -> str:
    """Write 1 to 9999 in English: ``four thousand two hundred thirty-one``."""
    if number >= 1000:
        return _joined(f"{ENGLISH_SMALL[number // 1000]} thousand", english, number % 1000)
    if number >= 100:
        return _joined(f"{ENGLISH_SMALL[number // 100]} hundred", english, number % 100)
    if number < 20:
        return ENGLISH_SMALL[number]
    tens, ones = divmod(number, 10)
    return ENGLISH_TENS[tens] + (f"-{ENGLISH_SMALL[ones]}" if ones else "")


def german(number: int) -> str:
    """Write 1 to 9999 in German: ``viertausendzweihunderteinunddreißig``."""
    stem = _german_stem(number)
    return f"{stem}s" if stem.endswith("ein") else stem


def spanish(number: int) -> str:
    """Write 1 to 9999 in Spanish: ``cuatro mil doscientos treinta y uno``."""
    if number >= 1000:
        thousands = number // 1000
        head = "mil" if thousands == 1 else f"{SPANISH_SMALL[thousands]} mil"
        return _joined(head, spanish, number % 1000)
    if number == 100:
        return "cien"
    if number > 100:
        return _joined(SPANISH_HUNDREDS[number // 100], spanish, number % 100)
    if number < 30:
        return SPANISH_SMALL[number]
    tens, ones = divmod(number, 10)
    return SPANISH_TENS[tens] + (f" y {SPANISH_SMALL[ones]}" if ones else "")


def roman(number: int) -> str:
    """Write 1 to 3999 in Roman numerals: ``MCMXCIV``."""
    letters = []
    for value, symbol in ROMAN_STEPS:
        count, number = divmod(number, value)
        letters.append(symbol * count)
    return "".join(letters)


def _joined(head: str, words: Callable[[int], str], rest: int) -> str:
    return f"{head} {words(rest)}" if rest else head


def _german_stem(number: int) -> str:
    """Write 0 to 9999 in German without the final s of ``eins``; 0 is empty."""
    if number >= 1000:
        return f"{_german_stem(number // 1000)}tausend{_german_stem(number % 1000)}"
    if number >= 100:
        return f"{_german_stem(number // 100)}hundert{_german_stem(number % 100)}"
    if number < 20:
        return GERMAN_SMALL[number] if number else ""
    tens, ones = divmod(number, 10)
    return (f"{GERMAN_SMALL[ones]}und" if ones else "") + GERMAN_TENS[tens]
