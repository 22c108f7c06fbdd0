"""Agreement of a bundle's labels and probabilities in bf16 and in fp32, on real speech.

python benchmarks/bf16.py BUNDLE DATASETDICT
"""

import argparse

import numpy as np

from accent_plugin.inference.classifier import AccentClassifier
from accent_plugin.inference.labelled import WHOLE_CLIPS, evaluate_model, read_labelled


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("data", help="DatasetDict with the splits train, validation and test")
    arguments = parser.parse_args()
    found = []
    for precision in ("fp32", "bf16"):
        options = {"device": "cpu", "precision": precision, **WHOLE_CLIPS}
        classifier = AccentClassifier.from_bundle(arguments.bundle, **options)
        rows = []
        for split in ("train", "validation", "test"):
            rows += read_labelled(arguments.data, classifier.labels, split=split)[0]
        predictions, _ = evaluate_model(classifier, rows, progress=False)
        found.append(np.exp(predictions.log_probabilities))
    exact, fast = found
    same = np.mean(exact.argmax(axis=1) == fast.argmax(axis=1))
    print(
        f"{len(exact)} clips: same label on {same:.2%}, probabilities differ by at most {abs(exact - fast).max():.4f}"
    )


if __name__ == "__main__":
    main()
