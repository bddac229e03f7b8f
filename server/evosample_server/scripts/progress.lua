-- How far ranks are, by the store's clock.
-- KEYS: progress. Returns {milliseconds now, {rank, what report.lua has noted, ...}}.
local now = redis.call('TIME')
return {string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)), redis.call('HGETALL', KEYS[1])}
