"""Wrong calls of flash_attention and decode_attention."""

import torch
from burnish.kernels import decode_attention, flash_attention
from wrong import Wrong, equals, finite, int32, randn, shape, tensors_of

Q, K = randn(12, 4, 16), randn(12, 2, 16, seed=1)
CACHE = randn(3, 8, 2, 16, seed=2)
NAN, INF = float("nan"), float("inf")


def packed(**changed):
    return lambda: flash_attention(**{"q": Q, "k": K, "v": K, "cu_seqlens": int32(0, 12), **changed})


def dense(T: int = 5, S: int = 5, **changed):
    q, k = randn(2, T, 4, 16), randn(2, S, 2, 16)
    return lambda: flash_attention(**{"q": q, "k": k, "v": k, **changed})


def derived(cu_seqlens, **options):
    """out, dq, dk and dv."""

    def call():
        leaves = [x.clone().requires_grad_() for x in (Q, K, K)]
        out, lse = flash_attention(*leaves, cu_seqlens=cu_seqlens, return_lse=True, **options)
        total = out.sum() + lse.masked_fill(lse == -INF, 0.0).sum()
        return out, *torch.autograd.grad(total, leaves)

    return call


def nowhere():
    """All gradients of a padded batch, with NaN upstream of the padding alone."""
    leaves = [x.clone().requires_grad_() for x in (Q, K, K, randn(4))]
    out, lse = flash_attention(*leaves[:3], sinks=leaves[3], cu_seqlens=int32(0, 9), return_lse=True)
    nan = torch.zeros(12, 1, 1)
    nan[9:] = NAN
    return torch.autograd.grad((out, lse), leaves, (nan.expand_as(out), nan[..., 0].expand_as(lse)))


def family(*parents: int):
    return derived(int32(0, 4, 8, 12), parents=int32(*parents))


def decode(**changed):
    given = {"q": randn(2, 4, 16), "k_cache": CACHE, "v_cache": CACHE}
    return lambda: decode_attention(**given | {"slot": int32(0, 1), "length": int32(3, 8)} | changed)


def second(call):
    """The output of the second sequence."""
    return lambda: call()[1:]


def meta(*tensors):
    return [x.to("meta") for x in tensors]


def zeros(found):
    assert all((t == 0).all() for t in tensors_of(found))


def whole(window):
    """The same as without a window."""
    return lambda: packed(window=window)() - packed()()


def prefix(slot: int, length: int):
    return decode(prefix_slot=int32(0, slot), prefix_length=int32(2, length))


MQ, MK, MCU, MCACHE, MTWO = meta(Q, K, int32(0, 12), CACHE, int32(0, 1))
POSITIVE = "expected a positive number, got"
INTEGER = "window: expected an integer, got 2.5"
TABLE = "cu_seqlens: expected "
FALLS = f"{TABLE}no entry below"
ONE = {"q": Q[:, :1], "k": K[:, :1], "v": K[:, :1]}
LATE = int32(*[0] * 270, 9, 3, 12)  # a kernel reads 256 at a time
PARENTS = "parents: expected -1, or a segment without a parent that stands directly before its children, got "

MANY = dense(q=torch.zeros(1, 1, 65536, 1), k=torch.zeros(1, 1, 1, 1), v=torch.zeros(1, 1, 1, 1))

CALLS = (
    Wrong("attention: window 0", packed(window=0), "window: expected at least 1, got 0"),
    Wrong("attention: window 2.5", packed(window=2.5), INTEGER),
    Wrong("attention: window 2^40", whole(2**40), equals(0.0)),
    Wrong("attention: window 2^70", whole(2**70), equals(0.0)),
    Wrong("attention: softcap 0", packed(softcap=0), f"softcap: {POSITIVE} 0"),
    Wrong("attention: softcap nan", packed(softcap=NAN), f"softcap: {POSITIVE} nan"),
    Wrong("attention: softcap inf", packed(softcap=INF), f"softcap: {POSITIVE} inf"),
    Wrong("attention: scale 0", packed(scale=0.0), f"scale: {POSITIVE} 0"),
    Wrong("attention: scale nan", packed(scale=NAN), f"scale: {POSITIVE} nan"),
    Wrong("attention: scale inf", packed(scale=INF), f"scale: {POSITIVE} inf"),
    Wrong(
        "attention: integers", dense(q=Q.int()[None], k=K.int()[None], v=K.int()[None]), "q: expected dtype"
    ),
    Wrong("attention: fp64", packed(q=Q.double(), k=K.double(), v=K.double()), finite, "q: expected dtype"),
    Wrong("attention: two dtypes", packed(q=Q.half()), "q, k, v: expected one dtype"),
    Wrong("attention: integer sinks", packed(sinks=int32(0, 0, 0, 0)), "sinks: expected dtype"),
    Wrong("attention: sinks of others", packed(sinks=randn(3)), r"sinks: expected shape \(heads=4\)"),
    Wrong("attention: heads no multiple", packed(q=Q[:, :3]), "q: expected a multiple of the 2"),
    Wrong(
        "attention: heads beyond a grid",
        MANY,
        equals(0.0),
        "q: expected at most 65535 heads on a GPU, got 65536",
    ),
    Wrong("attention: NaN upstream of no segment", nowhere, finite),
    Wrong("attention: no key heads", packed(k=K[:, :0], v=K[:, :0]), "q: expected a multiple of the 0"),
    Wrong(
        "attention: D=0",
        packed(q=Q[..., :0], k=K[..., :0]),
        "q: expected a head dimension of 1 to 256, got 0",
    ),
    Wrong("attention: T=0", dense(T=0), shape(2, 0, 4, 16)),
    Wrong("attention: S=0", dense(S=0), equals(0.0)),
    Wrong("attention: B=0", dense(q=Q[None][:0], k=K[None][:0], v=K[None][:0]), shape(0, 12, 4, 16)),
    Wrong("attention: no rows", packed(q=Q[:0], k=K[:0], v=K[:0], cu_seqlens=int32(0)), shape(0, 4, 16)),
    Wrong("attention: meta", packed(q=MQ, k=MK, v=MK, cu_seqlens=MCU), shape(12, 4, 16)),
    Wrong(
        "attention: meta, dense", dense(q=MQ[None], k=MK[None], v=MK[None], softcap=2.0), shape(1, 12, 4, 16)
    ),
    Wrong("attention: q on meta", packed(q=MQ), "k: expected on meta, got on cpu"),
    Wrong("attention: k on meta", packed(k=MK), "k: expected on cpu, got on meta"),
    Wrong(
        "attention: cu_seqlens on meta", packed(cu_seqlens=MCU), "cu_seqlens: expected on cpu, got on meta"
    ),
    Wrong("attention: cu_seqlens int64", packed(cu_seqlens=int32(0, 12).long()), f"{TABLE}.* torch.int32"),
    Wrong("attention: cu_seqlens empty", packed(cu_seqlens=int32()), f"{TABLE}.* torch.int32"),
    Wrong(
        "attention: cu_seqlens of one",
        packed(cu_seqlens=int32(12)),
        f"{TABLE}two entries or more for total=12",
    ),
    Wrong(
        "attention: cu_seqlens negative",
        derived(int32(-4, 7, 12)),
        f"{TABLE}entries from 0 to total=12",
        finite,
    ),
    Wrong("attention: cu_seqlens past the end", derived(int32(0, 6, 40)), f"{TABLE}.* got 0 to 40", finite),
    Wrong("attention: cu_seqlens 2^31-1", derived(int32(0, 2**31 - 1)), f"{TABLE}entries from 0", finite),
    Wrong("attention: cu_seqlens all outside", derived(int32(50, 60)), f"{TABLE}entries from 0", zeros),
    Wrong(
        "attention: cu_seqlens falls",
        derived(int32(0, 9, 4, 12)),
        rf"{TABLE}no entry below.* got \[9, 4\]",
        finite,
    ),
    Wrong("attention: cu_seqlens falls to -5", derived(int32(0, 9, -5, 12)), FALLS, finite),
    Wrong("attention: cu_seqlens falls late", packed(**ONE, cu_seqlens=LATE), FALLS, zeros),
    Wrong("attention: parents int64", packed(parents=torch.tensor([-1])), "parents: expected torch.int32"),
    Wrong(
        "attention: parents, not causal",
        packed(parents=int32(-1), causal=False),
        "parents: expected causal=True",
    ),
    Wrong("attention: parents on meta", packed(parents=MCU[:1]), "parents: expected on cpu, got on meta"),
    Wrong("attention: parent past the end", family(-1, 0, 77), f"{PARENTS}77 for segment 2", finite),
    Wrong("attention: parent -5", family(-1, -5, 0), f"{PARENTS}-5 for segment 1", finite),
    Wrong("attention: parent of a parent", family(-1, 0, 1), f"{PARENTS}1 for segment 2", finite),
    Wrong("attention: own parent", family(0, 0, 0), f"{PARENTS}0 for segment 0", finite),
    Wrong("attention: parents in a cycle", family(-1, 2, 1), f"{PARENTS}2 for segment 1", finite),
    Wrong("attention: parent behind", family(2, -1, -1), f"{PARENTS}2 for segment 0", finite),
    Wrong("attention: parent further before", family(-1, -1, 0), f"{PARENTS}0 for segment 2", finite),
    Wrong(
        "attention: parents of a table that falls",
        derived(int32(0, 9, 4, 12), parents=int32(-1, 0, 0), window=3),
        FALLS,
        finite,
    ),
    Wrong(
        "attention: parents past the end, window",
        derived(int32(0, 4, 8, 40), parents=int32(-1, 2**30, 77), window=3),
        f"{TABLE}entries from 0",
        finite,
    ),
    Wrong(
        "decode: slot past the end",
        second(decode(slot=int32(0, 9))),
        "slot: expected 0 to 2.* got 0 to 9",
        zeros,
    ),
    Wrong("decode: slot -1", second(decode(slot=int32(0, -1))), "slot: expected 0 to 2.* got -1 to 0", zeros),
    Wrong(
        "decode: length past the end",
        decode(length=int32(3, 99)),
        "length: expected 0 to 8.* got 3 to 99",
        finite,
    ),
    Wrong("decode: length 2^40", decode(length=torch.tensor([3, 2**40])), "length: expected 0 to 8", finite),
    Wrong(
        "decode: length -1",
        second(decode(length=int32(3, -1))),
        "length: expected 0 to 8.* got -1 to 3",
        zeros,
    ),
    Wrong(
        "decode: length -1, window", decode(length=int32(3, -1), window=2), "length: expected 0 to 8", finite
    ),
    Wrong("decode: prefix past the end", prefix(9, 2), "prefix_slot: expected 0 to 2.* got 0 to 9", finite),
    Wrong("decode: prefix -5", prefix(-5, 2), "prefix_slot: expected 0 to 2.* got -5 to 0", finite),
    Wrong("decode: prefix too long", prefix(2, 99), "prefix_length: expected 0 to 8.* got 2 to 99", finite),
    Wrong(
        "decode: prefix of length -4", prefix(2, -4), "prefix_length: expected 0 to 8.* got -4 to 2", finite
    ),
    Wrong("decode: float slots", decode(slot=randn(2)), "slot: expected dtype torch.int32 or torch.int64"),
    Wrong("decode: no slots", decode(k_cache=CACHE[:0], v_cache=CACHE[:0]), "slot: expected 0 to -1", zeros),
    Wrong("decode: window 0", decode(window=0), "window: expected at least 1, got 0"),
    Wrong("decode: window 2.5", decode(window=2.5), INTEGER),
    Wrong("decode: window 2^40", lambda: decode(window=2**40)() - decode()(), equals(0.0)),
    Wrong("decode: scale -1", decode(scale=-1.0), f"scale: {POSITIVE} -1"),
    Wrong("decode: scale nan", decode(scale=NAN), f"scale: {POSITIVE} nan"),
    Wrong("decode: softcap inf", decode(softcap=INF), f"softcap: {POSITIVE} inf"),
    Wrong(
        "decode: integers",
        decode(q=Q[:2].int(), k_cache=CACHE.int(), v_cache=CACHE.int()),
        "q: expected dtype",
    ),
    Wrong("decode: two dtypes", decode(q=randn(2, 4, 16).half()), "q, k_cache, v_cache: expected one dtype"),
    Wrong("decode: integer sinks", decode(sinks=int32(0, 0, 0, 0)), "sinks: expected dtype"),
    Wrong(
        "decode: D=0",
        decode(q=randn(2, 4, 0), k_cache=CACHE[..., :0]),
        "q: expected a head dimension of 1 to 256",
    ),
    Wrong("decode: B=0", decode(q=randn(0, 4, 16), slot=int32(), length=int32()), shape(0, 4, 16)),
    Wrong(
        "decode: meta",
        decode(q=MQ[:2], k_cache=MCACHE, v_cache=MCACHE, slot=MTWO, length=MTWO),
        shape(2, 4, 16),
    ),
    Wrong("decode: slots on meta", decode(slot=MTWO), "slot: expected on cpu, got on meta"),
    Wrong("decode: cache on meta", decode(k_cache=MCACHE), "k_cache: expected on cpu, got on meta"),
)
