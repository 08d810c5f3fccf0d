"""How good is a checkpoint, or a plan that was never written, on held-out text; and how far is it
from another one?

    rows.py       what is measured at each position, from logits
    meeting.py    two models run layer beside layer
    sums.py       measures added up by domain and layer
    greedy.py     where greedy decoding parts ways
    rounds.py     rounds of text, finished ones kept on disk
    measure.py    all of it together
"""
