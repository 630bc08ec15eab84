# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The score-aware loss (section 3)
#
# A search keeps only the largest inner products, so an error in a large one matters more than the
# same error in a small one. Definition 3.1 weighs the squared error of a score by w(score):
#
# $$\ell(x, \tilde x, w) = E_q\big[w(\langle q, x\rangle)\,\langle q, x - \tilde x\rangle^2\big].$$
#
# For queries spread evenly over the sphere it is an anisotropic quadratic form (Theorem 3.2):
# $h_\parallel \|r_\parallel\|^2 + h_\perp \|r_\perp\|^2$ with the parts of $r = x - \tilde x$ along
# and across x. This notebook sees that happen, and draws Figure 2.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import avq_jax

# %% [markdown]
# ## Theorem 3.2 by Monte Carlo
#
# Draw queries, evaluate Definition 3.1 directly, compare with the closed form. The closed form is
# up to a common factor, so two quantizations are compared by the ratio of their losses.

# %%
d, T = 24, 0.3
x = jax.random.normal(jax.random.key(0), (d,))
x = x / jnp.linalg.norm(x)
along = 0.1 * x
across = jax.random.normal(jax.random.key(1), (d,))
across = across - (across @ x) * x
across = 0.1 * across / jnp.linalg.norm(across)

q = jax.random.normal(jax.random.key(2), (2_000_000, d))
q = q / jnp.linalg.norm(q, axis=1, keepdims=True)
weight = avq_jax.Threshold(T)
w = weight(q @ x)
sampled = jnp.mean(w * (q @ along) ** 2) / jnp.mean(w * (q @ across) ** 2)
exact = avq_jax.eta(weight, 1.0, dim=d)
print(f"eta by sampling {sampled:.3f}, by Theorem 3.2 {exact:.3f}")
assert abs(sampled / exact - 1) < 0.03

# %% [markdown]
# ## Figure 2: eta / (d - 1) against its limit
#
# Theorem 3.4: $\eta / (d - 1) \to (T/\|x\|)^2 / (1 - (T/\|x\|)^2)$. In low dimension the limit is
# far off, even below 1, which Theorem 3.3 forbids; this package uses the exact value by default.

# %%
dims = np.unique(np.geomspace(2, 1000, 60).astype(int))
T = 0.2
ratio = [float(avq_jax.eta(avq_jax.Threshold(T), 1.0, dim=int(k))) / (k - 1) for k in dims]
limit = float(avq_jax.eta_limit(T, 1.0, dim=2))

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
axes.plot(dims, ratio, label="exact")
axes.axhline(limit, color="tab:red", linestyle="--", label="limit, Eq. (3)")
axes.set(xscale="log", yscale="log", xlabel="d", ylabel="eta / (d - 1)", title="w(t) = I(t >= 0.2)")
axes.legend()
axes.grid(alpha=0.3)

# %% [markdown]
# ## Weight functions side by side
#
# `Power(p)` has eta = p + 1 in every dimension and at every norm. A threshold depends on
# $T / \|x\|$, so for data of varied norms every row has its own eta.

# %%
norms = jnp.linspace(0.25, 4.0, 200)
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
weights = {
    "Threshold(0.2)": avq_jax.Threshold(0.2),
    "Power(3)": avq_jax.Power(3.0),
    "Exponential(10)": avq_jax.Exponential(10.0),
    "Uniform()": avq_jax.Uniform(),
}
for name, weight in weights.items():
    axes.plot(norms, avq_jax.eta(weight, norms, dim=100), label=name)
axes.set(xlabel="||x||", ylabel="eta", yscale="log", title="d = 100")
axes.legend()
axes.grid(alpha=0.3)
assert jnp.allclose(avq_jax.eta(avq_jax.Power(3.0), norms, dim=100), 4.0)
plt.show()
