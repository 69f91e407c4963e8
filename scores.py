"""Scores: R², Pearson r, the challenge score, and their summaries.

With activity y, prediction ŷ of a vertex over the n_images of a subject and its noise ceiling c:

    R²        = 1 - sum (y - ŷ)² / sum (y - mean y)²
    r         = Pearson correlation of y and ŷ; 0 where y or ŷ is constant
    challenge = min(max(r, 0)² / c, 1), c = 0 counting as 1e-14; its mean is the challenge score

Vertices that a subject lacks are never scored; a single picture gives no score. How much a number depends on
the pictures that happened to be scored, Bootstrap and interval() say. Moments and welch() compare two means.
"""

from itertools import product

import numpy as np
import torch

fewest_pictures = 10  # of a subject; resampling fewer says nothing
vertices_at_once = 2048  # of the bootstrap: 8 MB for each thing held of 1000 resamples
n_bins = 8192  # of the bootstrap's medians, which are right to 0.0004 at R² 0.2 and 0.0001 at 1


def r2_score(activity, prediction):
    """R² of every vertex, as sklearn.metrics.r2_score: 1 - sum (y - ŷ)² / sum (y - mean y)².

    activity, prediction (n_images, n_vertices) tensors -> (n_vertices,) float64. A constant vertex
    scores 1 if predicted exactly, else 0 (sklearn's rule); fewer than two images score NaN.
    """
    activity, prediction = activity.float(), prediction.float()
    if len(activity) < 2:
        return torch.full(activity.shape[1:], torch.nan, dtype=torch.float64)
    residual = (activity - prediction).square_().sum(0, dtype=torch.float64)
    total = (activity - activity.mean(0)).square_().sum(0, dtype=torch.float64)
    constant = (activity == activity[0]).all(0)
    r2 = 1 - residual / total
    r2[constant] = (residual[constant] == 0).double()
    return r2.cpu()


def pearson_r(activity, prediction):
    """activity, prediction (n_images, n_vertices) tensors -> r (n_vertices,) float64 on the CPU, 0 where either is
    constant; NaN for fewer than two images."""
    if len(activity) < 2:
        return torch.full(activity.shape[1:], torch.nan, dtype=torch.float64)
    x, y = activity.float(), prediction.float()
    constant = (x == x[0]).all(0) | (y == y[0]).all(0)
    x, y = x - x.mean(0), y - y.mean(0)
    xx, yy, xy = ((a * b).sum(0, dtype=torch.float64) for a, b in ((x, x), (y, y), (x, y)))
    return torch.where(constant, 0, xy / (xx * yy).sqrt()).clamp(-1, 1).cpu()


def challenge_scores(r, ceiling):
    """r, ceiling (n_vertices,) -> min(max(r, 0)² / ceiling, 1), a ceiling of 0 counting as 1e-14."""
    return np.minimum(np.maximum(r, 0) ** 2 / np.where(ceiling == 0, 1e-14, ceiling), 1)


def score(activity, prediction, has, ceiling):
    """{metric: (n_vertices,)} of one subject. has (n_vertices,): its vertices; the others get NaN."""
    found = {"r2": r2_score(activity, prediction).numpy(), "r": pearson_r(activity, prediction).numpy()}
    found["challenge"] = challenge_scores(found["r"], ceiling)  # NaN without a ceiling
    return {metric: np.where(has, values, np.nan) for metric, values in found.items()}


def sample_r2(activity, prediction):
    """R² of every sample over the vertices: (n_images, n_vertices) each -> (n_images,)."""
    return r2_score(activity.T, prediction.T).numpy()


def median_r2(scores, subjects, name="r2"):
    """Headline medians. scores: per subject (n_vertices of that subject,) or None without pictures
    -> {name: over all subjects and vertices, name_subj01: …}; NaN where nothing was scored."""
    known = [np.asarray(s) for s in scores if s is not None]
    pooled = np.concatenate(known) if known else np.array([])
    medians = {name: finite_median(pooled)}
    for subject, score in zip(subjects, scores):
        medians[f"{name}_{subject}"] = finite_median(np.array([]) if score is None else np.asarray(score))
    return medians


def count_pictures(counts, n_different):
    """What a score rests on, in words. counts: pictures of each subject."""
    counts = [n for n in counts if n]
    each = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0] if counts else 0)
    return f"{each} pictures a subject, {n_different} different ones"


def finite_median(values):
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else float("nan")


# ---- tables -------------------------------------------------------------------------------------


def summarise(scores, space):
    """scores {prediction: {metric: (n_subjects, n_vertices)}}, NaN where there is none -> rows {prediction, subject,
    hemisphere, roi_group, roi, metric, median, mean, n_vertices}; subject "all" pools all subjects' vertices."""
    left = np.arange(space.n_vertices) < space.n_lh
    sides = {"both": np.ones_like(left), "lh": left, "rh": ~left}
    areas = [space.regions(s) for s in range(len(space.subjects))]
    members_of = {"all": range(len(areas))} | {name: [s] for s, name in enumerate(space.subjects)}
    table = []
    for (subject, members), area, (hemi, side) in product(members_of.items(), areas[0], sides.items()):
        chosen = np.zeros(space.mask.shape, bool)
        for s in members:
            chosen[s] = areas[s][area] & side
        for prediction, metrics in scores.items():
            for metric, values in metrics.items():
                known = values[chosen]
                known = known[~np.isnan(known)]
                row = dict(prediction=prediction, subject=subject, hemisphere=hemi)
                row |= dict(roi_group=area[0], roi=area[1], metric=metric, median=finite_median(known))
                mean = float(known.mean()) if len(known) else float("nan")
                table.append(row | {"mean": mean, "n_vertices": len(known)})
    return table


overall = dict(hemisphere="both", roi_group="all", roi="all")  # where the table's rows are headlines


def pick(table, value, **where):
    """{subject: value} of the table's rows that agree with where."""
    return {row["subject"]: row[value] for row in table if all(row[k] == v for k, v in where.items())}


def headlines(table, bootstrap=None):
    """{prediction: {subject or "all": {metric: {"median", "mean", "median_95", "mean_95"}}}} of the table: NaN and,
    for the last two, the 95 % intervals, None where there is nothing."""
    found = {}
    for row in table:
        if overall.items() <= row.items():
            keys = row["subject"], row["prediction"], row["metric"]
            resampled = bootstrap.resampled(*keys) if bootstrap else None
            values = {k: row[k] for k in ("median", "mean")}
            values |= {f"{k}_95": resampled and interval(row[k], resampled[k]) for k in ("median", "mean")}
            found.setdefault(row["prediction"], {}).setdefault(row["subject"], {})[row["metric"]] = values
    return found


# ---- how much a number depends on the pictures --------------------------------------------------


class Bootstrap:
    """Medians and means over vertices on resampled pictures, subject by subject, for interval().

    Every resample draws as many pictures as there are, with replacement; a picture that several subjects saw is
    drawn for all of them together. Model and vertices stay the same. Several predictions see the same
    resamples, so that their differences can be resampled too.

    pictures: ids of all pictures scored, of any subject; device: where the sums are taken. Memory does not
    grow with the vertices: medians come from histograms (n_bins).
    """

    def __init__(self, pictures, n_resamples, seed, device="cpu"):
        self.pictures = np.unique(pictures)
        n = len(self.pictures)
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples)
        self.weights = torch.from_numpy(counts).float()  # (n_resamples, n_pictures): how often each is drawn
        self.device = device
        self.pooled, self.found, self.too_few = {}, {}, False

    def add(self, subject, pictures, activity, predictions, ceiling=None):
        """pictures: ids (n_images,); activity (n_images, n_vertices of the subject); predictions: {name: the same};
        ceiling (n_vertices,), NaN or None: no challenge score."""
        if len(pictures) < fewest_pictures:
            self.too_few = True
            return
        weights = self.weights[:, np.searchsorted(self.pictures, pictures)].to(self.device)
        ceiling = torch.full(activity.shape[1:], torch.nan) if ceiling is None else torch.as_tensor(ceiling)
        own = {}
        for start in range(0, activity.shape[1], vertices_at_once):
            part = slice(start, start + vertices_at_once)
            y, c = activity[:, part].to(self.device).float(), ceiling[part].to(self.device).float()
            predicted = {name: prediction[:, part].to(self.device).float() for name, prediction in predictions.items()}
            for name, scores in resampled_scores(y, predicted, weights, c).items():
                for metric, values in scores.items():
                    own.setdefault((name, metric), Spread(len(weights), self.device)).add(values)
        for key, spread in own.items():
            self.found[subject, *key] = spread.summary()
            self.pooled.setdefault(key, Spread(len(weights), self.device)).merge(spread)

    def resampled(self, subject, name, metric):
        """-> {"median", "mean"}: (n_resamples,) of a subject or "all", None where there were too few pictures."""
        if subject == "all" and not self.too_few and (name, metric) in self.pooled:
            return self.pooled[name, metric].summary()
        return self.found.get((subject, name, metric))


class Spread:
    """Distribution of scores over vertices, one for every resample, as sums and a histogram.

    Scores x are at most 1 and have no lower end: bins are of equal width in 1 / (2 - x).
    """

    def __init__(self, n_resamples, device):
        self.counts = torch.zeros(n_resamples, n_bins, dtype=torch.int32, device=device)
        self.sums = torch.zeros(n_resamples, dtype=torch.float64, device=device)

    def add(self, values):
        """values (n_resamples, n_vertices); NaN is left out."""
        known = ~values.isnan()
        bins = (n_bins / (2 - values.nan_to_num(0))).long().clamp_(0, n_bins - 1)
        self.counts.scatter_add_(1, bins, known.int())
        self.sums += values.nan_to_num(0).sum(1, dtype=torch.float64)

    def merge(self, other):
        self.counts += other.counts
        self.sums += other.sums

    def summary(self):
        """-> {"median", "mean"}: (n_resamples,) float64, NaN for a resample without scores."""
        below = self.counts.cumsum(1, dtype=torch.int64)
        n = below[:, -1:]
        k = torch.searchsorted(below, (n + 1) // 2).clamp_(max=n_bins - 1)  # the bin that holds the middle
        count = self.counts.gather(1, k)
        place = (n / 2 - below.gather(1, k) + count) / count  # within it
        median = 2 - n_bins / (k + place.clamp(0, 1)).double()
        median, mean = median[:, 0].where(n[:, 0] > 0, torch.nan), self.sums / n[:, 0]
        return {"median": median.cpu().numpy(), "mean": mean.cpu().numpy()}


def resampled_scores(activity, predictions, weights, ceiling):
    """Scores of every vertex with pictures repeated: r2_score, pearson_r and challenge_scores of them.

    activity (n_images, n_vertices), predictions {name: the same}, ceiling (n_vertices,), NaN where there is
    none; weights (n_resamples, n_images): how often a picture is repeated. float32 tensors on one device
    -> {name: {metric: (n_resamples, n_vertices)}}, challenge only with ceilings, NaN without a picture. The scores
    need the sums of y, y², ŷ, ŷ² and (y - ŷ)² over the pictures: a matrix product with the weights each, no loop.
    """
    n = weights.sum(1, keepdim=True)
    n = n.where(n > 0, torch.nan)
    y = activity - activity.mean(0)  # of small numbers float32 sums lose less

    def spread(x):
        sums, squares = weights @ x, weights @ x.square()
        around = squares - sums.square() / n
        return sums, squares, around, around <= 1e-5 * squares  # the last: whether constant, but for rounding

    sum_y, squares_y, around_y, constant_y = spread(y)
    found = {}
    for name, prediction in predictions.items():
        offset = activity.mean(0) - prediction.mean(0)
        x = prediction - prediction.mean(0)
        sum_x, squares_x, around_x, constant_x = spread(x)
        difference = weights @ (y - x).square()
        residual = difference + 2 * offset * (sum_y - sum_x) + n * offset.square()
        r2 = torch.where(constant_y, (residual == 0).float(), 1 - residual / around_y)
        product = (squares_y + squares_x - difference) / 2 - sum_y * sum_x / n
        r = torch.where(constant_y | constant_x, 0, product / (around_y * around_x).sqrt()).clamp(-1, 1)
        found[name] = {"r2": r2, "r": r}
        if not ceiling.isnan().any():
            found[name]["challenge"] = (r.clamp(min=0).square() / ceiling.where(ceiling != 0, 1e-14)).clamp(max=1)
    return found


def interval(score, resampled):
    """95 % interval of a score, or of a difference of scores, from its resampled values (n_resamples,).

    The middle 95 % of the resampled values, moved so that their median is the score: resamples repeat pictures,
    which by itself lowers R² by about 1 / n_images and raises the challenge score.
    """
    low, high = np.nanquantile(resampled, (0.025, 0.975)) - np.nanmedian(resampled) + score
    return [float(low), float(high)]


# ---- two means ----------------------------------------------------------------------------------


class Moments:
    """Mean and variance over pictures, taken a batch at a time (Chan et al. 1979), in float64."""

    def __init__(self):
        self.n, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values):
        """values (n, n_values) tensor."""
        values, n = values.double(), len(values)
        mean = values.mean(0)
        apart = mean - self.mean
        self.squares = self.squares + (values - mean).square().sum(0) + apart**2 * (self.n * n / (self.n + n))
        self.mean = self.mean + apart * (n / (self.n + n))
        self.n += n

    def error(self):
        """Squared standard error of the mean; NaN of a single picture."""
        return self.squares / (self.n - 1) / self.n if self.n > 1 else self.squares * torch.nan


def welch(a, b):
    """Difference of the means of two Moments, and its t value with variances that may differ (Welch's)."""
    difference = a.mean - b.mean
    return difference, difference / (a.error() + b.error()).sqrt()
