from .classify import ClassifyReport as ClassifyReport
from .classify import evaluate_classifier as evaluate_classifier
from .segment import evaluate_segment as evaluate_segment
