-- Marks a rank as finished; with the last one the epoch is sealed: OPEN -> SEALED.
-- KEYS: head, claims, finished. ARGV: uid, plan_id, generation, rank, claim, epoch
-- Returns 'ok' (also when repeated after the epoch has ended), 'sealed' (now, or before and not planned yet), 'gone',
-- 'superseded', 'behind' or 'closed'.
local h = redis.call('HMGET', KEYS[1], 'uid', 'plan_id', 'state', 'generation', 'world_size', 'epoch')
if h[1] ~= ARGV[1] then
  return 'gone'
end
local refused = refusal(h[4], redis.call('HGET', KEYS[2], ARGV[4]), ARGV[3], ARGV[5])
if refused then
  return refused
end
if tonumber(h[6]) > tonumber(ARGV[6]) then
  return 'ok'
end
if h[6] ~= ARGV[6] or h[2] ~= ARGV[2] or (h[3] ~= 'open' and h[3] ~= 'sealed') then
  return 'closed'
end
local is_new = redis.call('SETBIT', KEYS[3], ARGV[4], 1) == 0
local num_finished = redis.call('BITCOUNT', KEYS[3])
if is_new and num_finished == 1 then -- stragglers are waited for from here on, by this clock
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'finish_began_ms', string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)))
end
if num_finished == tonumber(h[5]) then
  redis.call('HSET', KEYS[1], 'state', 'sealed')
  return 'sealed'
end
return h[3] == 'sealed' and 'sealed' or 'ok'
