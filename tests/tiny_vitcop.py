"""Tiny random ViTCoP models, and the three stages written as slowly and plainly as possible."""

import math

import torch
from copies import remembered
from tiny import EOS, IMAGE, NUM_PATCHES, PAD, TEXT, VISION

from modeling_prunesid import ViTCoPLlavaConfig, ViTCoPLlavaForConditionalGeneration


NUM_LAYERS, BUDGET = 4, 8
# V and p of the defaults for 8 of 49 tokens and S, D = 1, 3 of 4 layers: with the 17 tokens of the line 0.2 + 0.9 P
# stage II would leave less than 77/172 of them.
KEEP_SHARE = (8 / 49) * 4 / (1 + 77 / 172 * (2 + 1 / 5))
CENTER_SHARE = 0.09 + 0.27 * 8 / 49


@remembered
def build_vitcop(budget=BUDGET, num_layers=NUM_LAYERS, vision=None, **settings):
    """A model of 49 patches an image; `settings` are fields of `ViTCoPConfig`."""
    torch.manual_seed(0)
    config = ViTCoPLlavaConfig(
        vision_config={**VISION, **(vision or {})},
        text_config={**TEXT, "num_hidden_layers": num_layers},
        image_token_index=IMAGE,
        image_seq_length=NUM_PATCHES,
        vitcop_config={"budget": budget, **settings},
    )
    model = ViTCoPLlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(20)
        model.lm_head.weight[[PAD, EOS, IMAGE]] = 0
    return model


def naive_clusters(keys, positions, num_centers):
    """VIC with loops over numbers: the cluster of each token."""
    n = len(keys)
    distance = [[math.dist(keys[i], keys[j]) for j in range(n)] for i in range(n)]
    density = [sum(math.exp(-((distance[i][j] / 8.0) ** 2)) for j in range(n)) for i in range(n)]
    delta, parent = [math.inf] * n, [None] * n
    for i in range(n):
        for j in range(n):
            may_be_parent = j != i and density[j] >= density[i] and math.dist(positions[i], positions[j]) <= 0.6
            if may_be_parent and distance[i][j] < delta[i]:
                delta[i], parent[i] = distance[i][j], j
    gamma = [delta[i] * density[i] for i in range(n)]
    centers = sorted(range(n), key=lambda i: -gamma[i])[:num_centers]
    labels = []
    for i in range(n):
        seen = set()
        while i not in centers and parent[i] is not None and i not in seen:
            seen.add(i)
            i = parent[i]
        labels.append(centers.index(i) if i in centers else len(centers))
    return labels


def naive_merge(states, norms, labels, count):
    """Stage II with lists: `(states, places)` of what is left."""
    n, num_clusters = len(labels), max(labels) + 1
    if count >= n:
        return states, list(range(n))
    clusters = [[i for i in range(n) if labels[i] == c] for c in range(num_clusters)]
    if num_clusters > count:
        order = sorted(clusters, key=lambda members: sum(norms[i] for i in members))
        kept, groups = [], order[: count - 1] + [sorted(i for members in order[count - 1 :] for i in members)]
    else:
        others, free = n - num_clusters, count - num_clusters
        quotas = [min(round((len(m) - 1) / others * free), len(m) - 1) for m in clusters]
        while sum(quotas) < free:  # round after round, the clusters of smallest sums of norms first
            for c in sorted(range(num_clusters), key=lambda c: sum(norms[i] for i in clusters[c])):
                if sum(quotas) < free and quotas[c] < len(clusters[c]) - 1:
                    quotas[c] += 1
        while sum(quotas) > free:  # those of largest sums first
            for c in sorted(range(num_clusters), key=lambda c: -sum(norms[i] for i in clusters[c])):
                if sum(quotas) > free and quotas[c] > 0:
                    quotas[c] -= 1
        kept, groups = [], []
        for members, quota in zip(clusters, quotas):
            best = sorted(members, key=lambda i: norms[i])[:quota]
            kept += best
            groups.append([i for i in members if i not in best])
    left = {i: states[i] for i in kept}
    for group in groups:
        middle = sorted(group)[len(group) // 2]
        left[middle] = states[middle] + torch.stack([states[i] for i in group]).mean(0)
    return torch.stack([left[i] for i in sorted(left)]), sorted(left)


@torch.no_grad()
def naive_features(model, image, keep_share, center_share):
    """Stage I of one image `(channels, height, width)` from a full run of the tower: features, places, clusters."""
    tower, num_heads = model.model.vision_tower, VISION["num_attention_heads"]
    layer = tower.config.num_hidden_layers - 2
    attention = tower.vision_model.encoder.layers[layer].self_attn if hasattr(tower, "vision_model") else None
    attention = tower.encoder.layers[layer].self_attn if attention is None else attention
    norm = (tower.vision_model if hasattr(tower, "vision_model") else tower).encoder.layers[layer].layer_norm1
    states = tower(image[None], output_hidden_states=True).hidden_states
    normed = norm(states[layer])
    queries, keys = attention.q_proj(normed)[0], attention.k_proj(normed)[0]
    dim = keys.shape[1] // num_heads
    score = torch.zeros(len(keys))
    for head in range(num_heads):
        part = slice(head * dim, (head + 1) * dim)
        score += (keys[:, part] @ queries[0, part] / math.sqrt(dim)).softmax(0)
    score = score[1:].tolist()
    count = max(int(keep_share * NUM_PATCHES + 1e-6), 1)
    places = sorted(sorted(range(NUM_PATCHES), key=lambda i: -score[i])[:count])
    side = math.isqrt(NUM_PATCHES)
    positions = [((i // side) / side, (i % side) / side) for i in places]
    clusters = naive_clusters(keys[1:][places].tolist(), positions, max(int(center_share * count + 1e-6), 1))
    features = model.model.multi_modal_projector(states[layer + 1][:, 1:][:, places])[0]
    return features, places, clusters


@torch.no_grad()
def naive_logits(model, ids, images, answer=()):
    """
    Logits `(vocab,)` of the last column of one unpadded prompt and an answer to it, recomputed without a cache, layer
    by layer, and the number of visual tokens in each layer. Follows the default settings.
    """
    decoder = model.model.language_model
    num_layers = len(decoder.layers)
    first, second = max(round(num_layers / 16), 1), round(11 * num_layers / 16)
    states, kinds = [], []  # of each column: the hidden state, and (image, cluster) of visual tokens
    encoded = [naive_features(model, image, KEEP_SHARE, CENTER_SHARE) for image in images]
    image = -1
    for index, token in enumerate(ids):
        if token != IMAGE:
            states.append(decoder.embed_tokens(torch.tensor(token)))
            kinds.append(None)
        elif ids[index - 1] != IMAGE:  # the first placeholder of an image stands for all that are kept of it
            image += 1
            features, _, clusters = encoded[image]
            states += list(features)
            kinds += [(image, cluster) for cluster in clusters]
    states += [decoder.embed_tokens(torch.tensor(token)) for token in answer]
    kinds += [None] * len(answer)
    states, columns = torch.stack(states), list(range(len(states)))
    entering = len(encoded[0][1])
    left = round((num_layers * BUDGET - first * entering) / (second - first + (num_layers - second) / 5))
    seen, keys = [], None
    for index, layer in enumerate(decoder.layers):
        if index in (first, second):
            norms = keys.unflatten(-1, (-1, layer.self_attn.head_dim)).mean(1).norm(dim=-1).tolist()
            rows = {i: states[i] for i in range(len(columns)) if kinds[columns[i]] is None}
            for number in range(len(images)):
                members = [i for i in range(len(columns)) if (kinds[columns[i]] or (-1,))[0] == number]
                if index == first:
                    labels = [kinds[columns[i]][1] for i in members]
                    new, kept = naive_merge(states[members], [norms[i] for i in members], labels, left)
                    rows |= {members[place]: row for place, row in zip(kept, new)}
                else:
                    best = sorted(members, key=lambda i: norms[i])[: max(round(left / 5), 1)]
                    rows |= {i: states[i] for i in best}
            states = torch.stack([rows[i] for i in sorted(rows)])
            columns = [columns[i] for i in sorted(rows)]
        seen.append(sum(kinds[column] is not None for column in columns))
        positions = torch.tensor(columns)
        mask = torch.zeros(1, 1, len(columns), len(columns))
        mask = mask.masked_fill(positions[None] > positions[:, None], float("-inf"))
        keys = layer.self_attn.k_proj(layer.input_layernorm(states))
        rotary = decoder.rotary_emb(states[None], position_ids=positions[None])
        states = layer(states[None], attention_mask=mask, position_embeddings=rotary)[0]
    return model.lm_head(decoder.norm(states[-1])), seen
