"""How good a network is: held-out loss, distance to the teacher, Frechet distance, share of samples read as asked."""

import statistics
import time
from functools import cached_property

import torch

from engine.run import seed_everything
from evaluation.metrics import frechet_distance_of_features

DRAWS = 4  # of noise and time for every held-out picture, the same for all networks
BATCH = 250


class Judge:
    """Measures networks of a problem against its held-out pictures and its teacher, always with the same draws."""

    def __init__(self, problem, train, held, teacher):
        self.problem, self.train, self.held, self.teacher = problem, train, held, teacher.eval()
        self.objective = problem.make_objective()
        repeats = [held.batch(slice(k, k + BATCH)) for k in range(0, len(held.x), BATCH)] * DRAWS
        self.batches = list(self._with_draws(repeats, seed=7))
        calibration = [train.batch(slice(0, BATCH))]
        self.calibration = list(self._with_draws(calibration * DRAWS, seed=8))

    @torch.no_grad()
    def _with_draws(self, batches, seed):
        for k, (x, y) in enumerate(batches):
            seed_everything(seed, k)
            draw = self.objective.draw(self.teacher, x, y)
            yield x, y, draw, self.objective.predict(self.teacher, x, y, draw)

    @torch.no_grad()
    def losses(self, net):
        """{"loss": held out, "distance": mean squared difference of the output to the teacher's, without variances}."""
        total, distance = [], []
        for x, y, draw, goal in self.batches:
            prediction = self.objective.predict(net, x, y, draw)
            total.append(self.objective.loss(prediction, x, draw)["loss"])
            distance.append((prediction - goal).square()[:, : x.shape[1]].flatten(1).mean(1))
        return {"loss": torch.cat(total).mean().item(), "distance": torch.cat(distance).mean().item()}

    @torch.no_grad()
    def calibration_loss(self, net):
        """Loss on pictures of the training data, right after the cut."""
        rows = [
            self.objective.loss(self.objective.predict(net, x, y, d), x, d)["loss"] for x, y, d, _ in self.calibration
        ]
        return torch.cat(rows).mean().item()

    @cached_property
    def reader(self):
        """A classifier of the pictures."""
        from sklearn.svm import SVC

        return SVC(C=10).fit(self.train.x.flatten(1).numpy(), self.train.y.numpy())

    @torch.no_grad()
    def samples(self, net, n=200):
        """{"frechet": distance over pixels, at 8 x 8, "read": share read as asked} of guided samples of a network."""
        family = self.problem.family
        own = family.own_defaults("sample")
        own |= {"sampler": "ddim", "cfg_channels": self.train.x.shape[1]} if "sampler" in own else {}
        sampler = family.make_sampler(20, 2.0, **own)
        seed_everything(9)
        y = torch.arange(n) % (int(self.train.y.max()) + 1)
        low, high = self.train.x.min(), self.train.x.max()
        x = sampler(net, y, torch.randn(n, *self.train.x.shape[1:])).clamp(low, high)
        distance = frechet_distance_of_features(small(x), small(self.train.x))
        return {
            "frechet": float(distance),
            "read": float((self.reader.predict(x.flatten(1).numpy()) == y.numpy()).mean()),
        }

    @torch.no_grad()
    def time_share(self, net, rounds=15):
        """Time of a forward of `net` as a share of that of the teacher: the median of ratios of runs in turns."""
        x, y, draw, _ = self.batches[0]
        ratios = []
        for _ in range(rounds):
            times = []
            for each in (net.eval(), self.teacher):
                start = time.perf_counter()
                self.objective.predict(each, x, y, draw)
                times.append(time.perf_counter() - start)
            ratios.append(times[0] / times[1])
        return statistics.median(ratios)


def small(x):
    """Pictures at 8 x 8, as features (N, 64)."""
    return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1).double().numpy()
