"""Gates that learn from pairs: two choices of layers for every image, and the difference of their losses.

The straight-through gradient takes the slope of the loss at a hard choice for what leaving a layer out would cost. At
a kept layer of a trained network that slope is near zero, however much the layer matters. The difference of two losses
is what a choice costs: times the gradient of the log-probabilities, it is on average the gradient of the expected loss
(REINFORCE with the other sample as its baseline, Kool et al. 2019), and takes no backward pass for the gates.
"""

import torch
from torch import nn


class PairStep(nn.Module):
    """One step of gates and weights: every image runs under two choices, with the same time, noise and label drop.

    Dropout inside blocks, where there is any (MAR), is drawn for each of the two: more noise, no bias.
    share: of the loss that compares with the output of `teacher`, which stays out of the module tree: neither
    broadcast nor saved.
    """

    def __init__(self, net, objective, share=0.0, teacher=None):
        super().__init__()
        self.net, self.objective, self.share = net, objective, share
        self._teacher = (teacher.eval().requires_grad_(False) if teacher else None,)

    @property
    def teacher(self):
        return self._teacher[0]

    def forward(self, x, y):
        """Latents x (N, C, H, W), labels y (N,) -> dict of per-sample terms (N,), means of both choices."""
        draw, teacher = self.objective.draw(self.net, x, y), self.teacher
        with torch.no_grad():
            goal = self.objective.predict(teacher, x, y, draw) if teacher else None
        choices = [self.net.gumbel_gates.choose(len(x)) for _ in range(2)]
        first, second = (self._measure(x, y, draw, mask, goal) for mask, _ in choices)
        log_ratio = choices[0][1] - choices[1][1]
        difference = (first["loss"] - second["loss"]).detach() / 2
        terms = {name: (first[name] + second[name]) / 2 for name in first}
        # Only the gradient of this is of use; its value would add noise to the loss that is reported.
        terms["loss"] = terms["loss"] + difference * (log_ratio - log_ratio.detach())
        return terms

    def _measure(self, x, y, draw, mask, goal):
        """Terms (N,) of one choice, `loss` among them."""
        prediction = self.objective.predict(self.net, x, y, draw, mask=mask)
        terms = self.objective.loss(prediction, x, draw)
        if goal is None:
            return terms
        terms |= {"gt": terms["loss"], **self.objective.match(prediction, goal, x, draw)}
        return {**terms, "loss": self.share * terms["kd_loss"] + (1 - self.share) * terms["gt"]}
