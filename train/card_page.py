"""A checkpoint's card as a page: what it answers, and what nobody stated."""

from __future__ import annotations

from collections.abc import Mapping

from cxrgaze.report import (
    Block,
    Bullets,
    Heading,
    Paragraph,
    Table,
    Verdict,
    page_files,
)
from cxrgaze.train.card import Card, Population, Statements
from cxrgaze.train.evaluation_tables import (
    auc_table,
    calibration_tables,
    identity,
    operating_table,
    saliency_table,
    subgroup_table,
)
from cxrgaze.train.evaluation_verdict import verdict

NOT_STATED = "not stated"
NOT_RECORDED = "not recorded: a set's test films may be among them (leakage cannot be excluded)"


def pages(card: Card, stem: str) -> dict[str, bytes]:
    """The page as Markdown and as HTML (`page_files`)."""
    return page_files(stem, f"Card of {card.name}", _blocks(card))


def not_stated(card: Card) -> tuple[list[str], int]:
    """Questions that the card does not answer, and how many there are."""
    population = card.population.get("train")
    answers = {
        **card.statements.model_dump(),
        "films, patients and classes of training": population,
        "ages": population and population.ages,
        "sexes": population and set(population.sexes) - {""},
        "views": population and set(population.views) - {""},
        "figures with intervals": card.evaluations,
        "an evaluation on films of another origin": [
            e for e in card.evaluations if e.set.origin != card.trained_on
        ],
    }
    return [_words(name) for name, answer in answers.items() if not answer], len(answers)


def _blocks(card: Card) -> list[Block]:
    missing, questions = not_stated(card)
    found = [verdict(one) for one in card.evaluations]
    said = f"{len(missing)} of {questions} questions: {', '.join(missing) or 'none'}."
    return [
        *found,
        Verdict("Not stated", said, "open" if missing else "good"),
        Paragraph(f"{card.notice} {card.spec.caution or ''}".rstrip()),
        Heading("Network"),
        _network(card),
        Heading("Use"),
        _statements(card.statements),
        Heading("Films that it was trained on"),
        *_population(card),
        Heading("How it decides"),
        *_decision(card),
        Heading("Figures"),
        *_figures(card),
        Heading("How it was made"),
        _made(card),
    ]


def _network(card: Card) -> Table:
    spec = card.spec
    classes = ", ".join(f"{c.display} ({c.name})" for c in spec.classes) or "none"
    untaught = [f"class {name}" for name in card.untaught]
    untaught += [f"output {head}" for head in card.untrained]
    return Table(
        ("", ""),
        (
            ("variant", f"{spec.variant}, {card.parameters:,} parameters"),
            ("canvas", f"{spec.height}x{spec.width}, films from {spec.pixel_source}"),
            ("outputs", ", ".join(spec.heads)),
            (f"classes ({spec.class_kind})", classes),
            ("not served, as nothing taught it", ", ".join(untaught) or "nothing"),
            ("weights, SHA-256", card.weights_sha256),
        ),
    )


def _statements(statements: Statements) -> Table:
    rows = [(_words(n), v or NOT_STATED) for n, v in statements.model_dump().items()]
    return Table(("question", "answer"), rows)


def _population(card: Card) -> list[Block]:
    if not card.population:
        return [Paragraph(f"{card.trained_on}. Numbers: {NOT_STATED}.")]
    rows = {name: _described(one) for name, one in card.population.items()}
    first = next(iter(rows.values()))
    table = [(question, *(row[question] for row in rows.values())) for question in first]
    return [Paragraph(f"{card.trained_on}."), Table(("", *rows), table)]


def _described(of: Population) -> dict[str, str]:
    ages = NOT_STATED
    if of.ages:
        low, first, median, third, high = of.ages
        ages = f"median {median:g} (quartiles {first:g} to {third:g}, {low:g} to {high:g})"
        ages += "" if of.known_ages == of.films else f"; of {of.known_ages} films"
    return {
        "films, patients": f"{of.films}, {of.patients}",
        "classes": _counts(of.classes),
        "without a label": str(of.unlabelled),
        "with gaze": str(of.with_gaze),
        "age in years": ages,
        "sex": _counts(of.sexes),
        "view": _counts(of.views),
        "pixels from": _counts(of.pixel_sources),
    }


def _counts(counts: Mapping[str, int]) -> str:
    if not set(counts) - {""}:
        return NOT_STATED
    return ", ".join(f"{count} {name or NOT_STATED}" for name, count in counts.items())


def _decision(card: Card) -> list[Block]:
    decision = card.decision
    temperatures = decision.temperatures or {"all classes": decision.temperature}
    lines = [f"temperature of {name}: {value:.3f}" for name, value in temperatures.items()]
    lines += [f"flag of {n} from {p:.3f} on" for n, p in decision.operating_points.items()]
    if not card.spec.classes:
        return [Paragraph("It gives the map alone.")]
    said = (
        "The float32 network. A bundle of lower precision decides by its own, which its "
        "report/parity.html and manifest have."
    )
    return [Bullets(lines), Paragraph(said)]


def _figures(card: Card) -> list[Block]:
    if not card.evaluations:
        return [
            Paragraph(
                "None with intervals: cxrgaze-train evaluate makes them, cxrgaze-train card "
                "--evaluation puts them here."
            )
        ]
    blocks: list[Block] = []
    for one in card.evaluations:
        blocks += [verdict(one), identity(one)]
        if one.diagnosis:
            blocks += [*auc_table(one.diagnosis), *operating_table(one.diagnosis)]
            blocks += [*calibration_tables(one.diagnosis), *subgroup_table(one.diagnosis)]
        if one.saliency:
            blocks += saliency_table(one.saliency)
        if one.left_out:
            blocks.append(Bullets([f"left out: {reason}" for reason in one.left_out]))
    return blocks


def _made(card: Card) -> Table:
    versions = ", ".join(f"{name} {value}" for name, value in card.environment.items())
    lineage = "; ".join(
        f"{o.trained_on or 'unknown'} {o.weights_sha256[:12]}".strip() for o in card.lineage
    )
    return Table(
        ("", ""),
        (
            ("command", card.command),
            ("seed", card.config.get("seed", NOT_STATED)),
            ("descends from", lineage or NOT_STATED),
            *(() if card.seen_sha256 else (("films that it has seen", NOT_RECORDED),)),
            ("environment", versions),
        ),
    )


def _words(name: str) -> str:
    return name.replace("_", " ")
