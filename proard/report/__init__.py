"""Turns the tables of a run into one offline page, its figures, and the summary in the terminal."""

from proard.report.facts import Duration, Student, durations, exported_students
from proard.report.fronts import SearchComparison, compare_searches
from proard.report.inputs import Card, Results, load_results
from proard.report.page import render

__all__ = [
    "Card",
    "Duration",
    "Results",
    "SearchComparison",
    "Student",
    "compare_searches",
    "durations",
    "exported_students",
    "load_results",
    "render",
]
